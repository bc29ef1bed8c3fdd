"""Step ``answer``: load a model once and let lm-eval ask it a batch of tasks."""

import sys

from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Write one file of answers a task."""
    import lm_eval.models.huggingface  # noqa: F401 - seconds of the start, not of the work

    from llmfusion.evaluation.answers import ask
    from llmfusion.models.batches import device_of
    from llmfusion.models.loading import load_model, load_tokenizer

    spec, settings = job.spec, job.spec["answering"]
    artifact = job.input(f"models/{spec['model']}")
    tokenizer = load_tokenizer(artifact, spec.get("chat_template"))
    model = load_model(artifact, settings.get("dtype", "bfloat16")).to(device_of())
    staged = {name: job.input(f"data/tasks/{name}") for name in spec["tasks"]}
    job.begins()
    job.facts.update(ask(model, tokenizer, spec["tasks"], staged, settings.get("batch_size", 32), job.folder))


if __name__ == "__main__":
    sys.exit(run("answer", build))
