"""Step ``capture``: cache what a teacher says at the label rows of a mix; alone, or as one of several shards that a last job gathers."""

import sys
from itertools import islice
from typing import Any

from llmfusion.artifacts import SHARDS, Artifact, require
from llmfusion.step import Job, run

COUNTED = 500  # samples of the mix whose rows are counted beforehand


def build(job: Job) -> None:
    """Write pieces, index, head and tokenizer; see :mod:`llmfusion.teachers.layout`."""
    spec = job.spec
    teacher, mix = job.input(f"models/{spec['model']}"), job.input(f"data/mix/{spec['mix']}")
    shards = [job.inputs[address] for address in job.inputs if address.startswith(SHARDS)]
    if shards:
        _gather(job, teacher, mix, shards)
    else:
        _capture(job, teacher, mix)


def _capture(job: Job, teacher: Artifact, mix: Artifact) -> None:
    """Read the mix, or a shard's part of it; finished pieces wait in ``work/`` until all are there."""
    from llmfusion.teachers.capture import capture, capture_pieces
    from llmfusion.teachers.pieces import Shard, Store, hand_over

    spec, settings, template = job.spec, job.spec["capture"], job.spec.get("chat_template")
    shard, store = Shard.of(spec), Store(job.work / "pieces", job.key)
    what = f"the cache of {spec['model']} over {spec['mix']}"
    size = least_bytes(teacher, mix, spec) // shard.count
    apart = job.folder.stat().st_dev != job.work.stat().st_dev  # else a piece in work/ and in the result is one file
    left = max(0, size - store.size())
    job.need(what, size if apart else left, left if apart else 0)
    job.begins()
    if shard.count == 1:
        job.facts.update(capture(teacher, mix, job.folder, settings, template, store))
        print(f"{job.facts['samples']} samples, {job.facts['rows']} rows; log-prob gap {job.facts['logprob_gap']:.2g} nats")
        return
    capture_pieces(teacher, mix, settings, template, store, shard)
    notes = hand_over(store.folder, job.folder)
    job.facts.update(pieces=len(notes), rows=sum(row["length"] for note in notes for row in note["index"]))
    print(f"{job.facts['pieces']} pieces, {job.facts['rows']} rows")


def _gather(job: Job, teacher: Artifact, mix: Artifact, shards: list[Artifact]) -> None:
    """Join the shards' pieces; the files are theirs by a second name, so that they take no room twice."""
    from llmfusion.teachers.capture import join

    spec = job.spec
    made_from = {f"models/{spec['model']}": teacher.sha256, f"data/mix/{spec['mix']}": mix.sha256}
    for shard in shards:
        same = {key: value for key, value in shard.spec.items() if key != "shard"} == spec and shard.manifest["inputs"] == made_from
        require(same, f"{shard.folder}: was made from other settings or inputs than this cache; remove the folder and run again")
    if job.folder.stat().st_dev != shards[0].folder.stat().st_dev:
        size = sum(entry["size"] for shard in shards for entry in shard.manifest["files"].values())
        job.need(f"the cache of {spec['model']} over {spec['mix']}", size)
    job.begins()
    job.facts.update(join(teacher, mix, [shard.folder for shard in shards], job.folder, spec["capture"], spec.get("chat_template")))
    print(f"{job.facts['samples']} samples, {job.facts['rows']} rows from {len(shards)} shards; log-prob gap {job.facts['logprob_gap']:.2g} nats")


def row_bytes(settings: dict[str, Any], width: float) -> float:
    """Bytes of a row of a cache of a teacher of this width: 2d + 16 for hidden states in bfloat16."""
    kind = settings.get("kind", "hidden")
    of_kind = {"hidden": width * (4 if settings.get("dtype") == "float32" else 2), "topk": 8 * settings.get("k", 10) + 4, "online": 0}
    return 16 + of_kind[kind]


def least_bytes(teacher: Artifact, mix: Artifact, spec: dict[str, Any]) -> int:
    """Bytes of a cache at the least: the head, and rows as many as the first samples let expect (a fifth less: that is never too many)."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_jsonl
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher, spec.get("chat_template"))
    counted = [encode(sample, tokenizer, mix.facts["max_length"]) for sample in islice(read_jsonl(mix.file("samples.jsonl")), COUNTED)]
    rows = sum(len(found.label_ids) for found in counted if not isinstance(found, str))
    if (samples := mix.facts["samples"]) > COUNTED:
        rows = int(0.8 * rows * samples / COUNTED)
    width = teacher.facts["hidden_size"] or 0
    state = width * (4 if spec["capture"].get("dtype") == "float32" else 2)
    return teacher.facts["vocabulary_size"] * state + int(rows * row_bytes(spec["capture"], width))


if __name__ == "__main__":
    sys.exit(run("capture", build))
