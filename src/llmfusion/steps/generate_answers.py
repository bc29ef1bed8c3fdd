"""A source model's own greedy answers to the prompts of a mix (SeqKD, Kim & Rush 2016)."""

import logging

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited
from llmfusion.study.kinds.generate_answers import Spec

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``: the mix's samples with the model's answer as last turn; facts count those left out."""
    from llmfusion.data.rejections import Rejected
    from llmfusion.data.samples import read_samples
    from llmfusion.errors import UserError
    from llmfusion.io.jsonl import write_jsonl
    from llmfusion.models.batches import default_device
    from llmfusion.models.loading import load_model, load_tokenizer
    from llmfusion.teachers.generation import answer_all

    spec = job.parse(Spec)
    source = job.input(f"models/{spec.model}")
    mix = job.input(f"data/mix/{spec.mix}")
    max_length = mix.facts["max_length"]
    tokenizer = load_tokenizer(source, spec.chat_template)
    model = load_model(source, spec.generation.dtype).to(default_device())
    samples = [sample for sample in read_samples(mix.file("samples.jsonl")) if "messages" in sample]
    if not samples:
        raise UserError(f"{mix.folder}: holds raw text only; there is nothing to answer")
    job.mark_started()
    rejected = Rejected()
    answered = answer_all(model, tokenizer, samples, max_length, spec.generation.batch_size, rejected)
    count = write_jsonl(job.folder / "samples.jsonl", answered)
    if not count:
        raise UserError(f"{spec.model} gave no usable answer to {len(samples)} prompts: {rejected.facts()}")
    job.facts.update(samples=count, asked=len(samples), rejected=rejected.facts(), max_length=max_length)
    job.facts["license"] = inherited(job.inputs)
    logger.info("%d of %d answers kept; dropped: %s", count, len(samples), dict(rejected.counts) or "none")
