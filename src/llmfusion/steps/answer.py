"""Load a model once and let lm-eval ask it a batch of tasks."""

from llmfusion.artifacts.job import Job
from llmfusion.io.offline import go_offline
from llmfusion.study.kinds.answer import Spec


def build(job: Job) -> None:
    """Write one file of answers a task. Everything that is asked is on disk: nothing may be fetched."""
    go_offline()
    import lm_eval.models.huggingface  # noqa: F401 - seconds of the start, not of the work

    from llmfusion.evaluation.answers import ask
    from llmfusion.models.batches import default_device
    from llmfusion.models.loading import load_model, load_tokenizer

    spec = job.parse(Spec)
    artifact = job.input(f"models/{spec.model}")
    tokenizer = load_tokenizer(artifact, spec.chat_template)
    model = load_model(artifact, spec.answering.dtype).to(default_device())
    staged = {name: job.input(f"data/tasks/{name}") for name in spec.tasks}
    job.mark_started()
    job.facts.update(ask(model, tokenizer, spec.tasks, staged, spec.answering.batch_size, job.folder))
