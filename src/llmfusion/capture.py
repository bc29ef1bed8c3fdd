"""Step ``capture``: cache a teacher's final hidden states over a mix."""

import sys
from itertools import islice

from llmfusion.artifacts import Artifact
from llmfusion.step import Job, run

COUNTED = 500  # samples of the mix whose rows are counted beforehand


def build(job: Job) -> None:
    """Write shards, index, head and tokenizer; see :mod:`llmfusion.teachers.cache` for the layout."""
    from llmfusion.teachers.capture import capture

    spec = job.spec
    teacher, mix = job.input(f"models/{spec['model']}"), job.input(f"data/mix/{spec['mix']}")
    job.need(f"the cache of {spec['model']} over {spec['mix']}", least_bytes(teacher, mix, spec))
    job.begins()
    job.facts.update(capture(teacher, mix, job.folder, spec["capture"], spec.get("chat_template")))
    print(f"{job.facts['samples']} samples, {job.facts['rows']} rows; log-prob gap {job.facts['logprob_gap']:.2g} nats")


def least_bytes(teacher: Artifact, mix: Artifact, spec: dict) -> int:
    """Bytes of a cache at the least: the head, and rows as many as the first samples let expect (a fifth less: that is never too many)."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_jsonl
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher, spec.get("chat_template"))
    counted = [encode(sample, tokenizer, mix.facts["max_length"]) for sample in islice(read_jsonl(mix.file("samples.jsonl")), COUNTED)]
    rows = sum(len(found.label_ids) for found in counted if not isinstance(found, str))
    if (samples := mix.facts.get("samples", 0)) > COUNTED:
        rows = int(0.8 * rows * samples / COUNTED)
    state = (teacher.facts["hidden_size"] or 0) * (4 if spec["capture"].get("dtype") == "float32" else 2)
    return teacher.facts["vocabulary_size"] * state + rows * (state + 16)


if __name__ == "__main__":
    sys.exit(run("capture", build))
