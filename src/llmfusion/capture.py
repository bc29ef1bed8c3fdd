"""Step ``capture``: cache a teacher's final hidden states over a mix."""

import sys

from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Write shards, index, head and tokenizer; see :mod:`llmfusion.teachers.cache` for the layout."""
    from llmfusion.teachers.capture import capture

    spec = job.spec
    teacher, mix = job.input(f"models/{spec['model']}"), job.input(f"data/mix/{spec['mix']}")
    job.facts.update(capture(teacher, mix, job.folder, spec["capture"], spec.get("chat_template")))
    print(f"{job.facts['samples']} samples, {job.facts['rows']} rows; log-prob gap {job.facts['logprob_gap']:.2g} nats")


if __name__ == "__main__":
    sys.exit(run("capture", build))
