"""Step ``generate``: what a source model answers to the prompts of a mix (SeqKD, Kim & Rush 2016), greedily."""

import sys

from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Write ``samples.jsonl``: the mix's samples with the source's last answer in place of theirs; facts count what was dropped."""
    from llmfusion.data.samples import read_jsonl, write_jsonl
    from llmfusion.data.sources import Rejected
    from llmfusion.errors import UserError
    from llmfusion.models.batches import device_of
    from llmfusion.models.loading import load_model, load_tokenizer
    from llmfusion.teachers.generation import answer_all

    spec, settings = job.spec, job.spec["generation"]
    source, mix = job.input(f"models/{spec['model']}"), job.input(f"data/mix/{spec['mix']}")
    tokenizer = load_tokenizer(source, spec.get("chat_template"))
    model = load_model(source, settings.get("dtype", "bfloat16")).to(device_of())
    rejected = Rejected()
    samples = [s for s in read_jsonl(mix.file("samples.jsonl")) if "messages" in s]
    if not samples:
        raise UserError(f"{mix.folder}: holds raw text only; there is nothing to answer")
    job.begins()
    kept = answer_all(model, tokenizer, samples, mix.facts["max_length"], settings.get("batch_size", 32), rejected)
    count = write_jsonl(job.folder / "samples.jsonl", kept)
    if not count:
        raise UserError(f"{spec['model']} gave no usable answer to {len(samples)} prompts: {rejected.facts()}")
    job.facts.update(samples=count, asked=len(samples), rejected=rejected.facts(), max_length=mix.facts["max_length"])
    print(f"{count} of {len(samples)} answers kept; dropped: {dict(rejected.counts) or 'none'}")


if __name__ == "__main__":
    sys.exit(run("generate", build))
