"""Cache a teacher's outputs at the label rows of a mix; alone, or assembled from what several shards have captured."""

import json
import logging
from itertools import islice

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import require
from llmfusion.study.addresses import is_shard
from llmfusion.study.kinds.capture_teacher import Spec, row_bytes

COUNTED = 500  # samples of the mix whose rows are counted beforehand
logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write chunks, index, head and tokenizer; see :mod:`llmfusion.teachers.cache_format`."""
    spec = job.parse(Spec)
    teacher = job.input(f"models/{spec.model}")
    mix = job.input(f"data/mix/{spec.mix}")
    shards = [artifact for address, artifact in job.inputs.items() if is_shard(address)]
    if shards:
        _assemble(job, spec, teacher, mix, shards)
    else:
        _capture(job, spec, teacher, mix)


def _capture(job: Job, spec: Spec, teacher: Artifact, mix: Artifact) -> None:
    """Read the whole mix; finished chunks wait in ``work/`` until all are there."""
    from llmfusion.teachers.capture import capture

    store = ResumeFolder(job.work / "pieces", job.key)
    require_disk_of_cache(job, spec, teacher, mix, store, 1)
    job.mark_started()
    job.facts.update(capture(teacher, mix, job.folder, spec.capture, spec.chat_template, store))
    facts = job.facts
    logger.info("%d samples, %d rows; log-prob gap %.2g nats", facts["samples"], facts["rows"], facts["logprob_gap"])


def _assemble(job: Job, spec: Spec, teacher: Artifact, mix: Artifact, shards: list[Artifact]) -> None:
    """Join the shards' chunks; the files are theirs by a second name, so that they take no room twice."""
    from llmfusion.teachers.capture import assemble_cache

    made_from = {f"models/{spec.model}": teacher.sha256, f"data/mix/{spec.mix}": mix.sha256}
    own = {key: value for key, value in json.loads(job.spec).items() if key != "shard"}
    for shard in shards:
        same = {key: value for key, value in shard.spec.items() if key != "shard"} == own and shard.manifest[
            "inputs"
        ] == made_from
        require(
            same,
            f"{shard.folder}: was made from other settings or inputs than this cache; remove the folder and run again",
        )
    if job.folder.stat().st_dev != shards[0].folder.stat().st_dev:
        size = sum(entry["size"] for shard in shards for entry in shard.manifest["files"].values())
        job.require_disk(f"the cache of {spec.model} over {spec.mix}", size)
    job.mark_started()
    job.facts.update(
        assemble_cache(teacher, mix, [shard.folder for shard in shards], job.folder, spec.capture, spec.chat_template)
    )
    facts = job.facts
    logger.info(
        "%d samples, %d rows from %d shards; log-prob gap %.2g nats",
        facts["samples"],
        facts["rows"],
        len(shards),
        facts["logprob_gap"],
    )


def require_disk_of_cache(
    job: Job, spec: Spec, teacher: Artifact, mix: Artifact, store: ResumeFolder, shards: int
) -> None:
    """Raise :class:`~llmfusion.errors.UserError` where one of ``shards`` equal shares of the cache does not fit on the disk."""
    size = least_bytes(teacher, mix, spec) // shards
    left = max(0, size - store.size())
    result, resume = (
        (left, 0) if job.on_same_disk() else (size, left)
    )  # on one disk a chunk in work/ and in the result is one file
    job.require_disk(f"the cache of {spec.model} over {spec.mix}", result, resume)


def least_bytes(teacher: Artifact, mix: Artifact, spec: Spec) -> int:
    """Bytes of a cache at the least: the head, and rows as many as the first samples let expect (a fifth less: that is never too many)."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_jsonl
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher, spec.chat_template)
    counted = [
        encode(sample, tokenizer, mix.facts["max_length"])
        for sample in islice(read_jsonl(mix.file("samples.jsonl")), COUNTED)
    ]
    rows = sum(len(encoded.label_ids) for encoded in counted if not isinstance(encoded, str))
    if (samples := mix.facts["samples"]) > COUNTED:
        rows = int(0.8 * rows * samples / COUNTED)
    hidden_size = teacher.facts["hidden_size"] or 0
    state = hidden_size * (4 if spec.capture.dtype == "float32" else 2)
    return teacher.facts["vocabulary_size"] * state + int(rows * row_bytes(spec.capture, hidden_size))
