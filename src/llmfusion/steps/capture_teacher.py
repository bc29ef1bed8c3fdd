"""Cache a teacher's outputs at the label positions of a mix, in one job or assembled from several shards."""

import json
import logging
from itertools import islice

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited
from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import require
from llmfusion.study.addresses import is_shard
from llmfusion.study.kinds.capture_teacher import Spec, row_bytes, state_bytes

COUNTED_SAMPLES = 500  # of the mix, whose rows are counted beforehand
logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write chunks, index, head and tokenizer; see :mod:`llmfusion.teachers.cache_format`."""
    spec = job.parse(Spec)
    teacher = job.input(f"models/{spec.model}")
    mix = job.input(f"data/mix/{spec.mix}")
    shards = [artifact for address, artifact in job.inputs.items() if is_shard(address)]
    job.facts["license"] = inherited({f"models/{spec.model}": teacher, f"data/mix/{spec.mix}": mix})
    if shards:
        _assemble(job, spec, teacher, mix, shards)
    else:
        _capture(job, spec, teacher, mix)


def _capture(job: Job, spec: Spec, teacher: Artifact, mix: Artifact) -> None:
    """Capture the whole mix; finished chunks stay in ``work/`` until all are there."""
    from llmfusion.teachers.capture import capture

    finished = finished_chunks(job)
    require_disk_of_cache(job, spec, teacher, mix, finished, 1)
    job.mark_started()
    job.facts.update(capture(teacher, mix, job.folder, spec.capture, spec.chat_template, finished))
    facts = job.facts
    logger.info("%d samples, %d rows; log-prob gap %.2g nats", facts["samples"], facts["rows"], facts["logprob_gap"])


def finished_chunks(job: Job) -> ResumeFolder:
    """The chunks that this job has finished in earlier attempts, without what was half-written when one was killed."""
    finished = ResumeFolder(job.work / "pieces", job.key)
    finished.remove_temporary()
    return finished


def _assemble(job: Job, spec: Spec, teacher: Artifact, mix: Artifact, shards: list[Artifact]) -> None:
    """Assemble the shards' chunks; the files are hard links, so that they take no room twice."""
    from llmfusion.teachers.capture import assemble_cache

    for shard in shards:
        _require_shard_of(job, spec, teacher, mix, shard)
    if job.folder.stat().st_dev != shards[0].folder.stat().st_dev:
        size = sum(entry["size"] for shard in shards for entry in shard.manifest["files"].values())
        job.require_disk(f"the cache of {spec.model} over {spec.mix}", size)
    job.mark_started()
    folders = [shard.folder for shard in shards]
    job.facts.update(assemble_cache(teacher, mix, folders, job.folder, spec.capture, spec.chat_template))
    facts = job.facts
    logger.info(
        "%d samples, %d rows from %d shards; log-prob gap %.2g nats",
        facts["samples"],
        facts["rows"],
        len(shards),
        facts["logprob_gap"],
    )


def _require_shard_of(job: Job, spec: Spec, teacher: Artifact, mix: Artifact, shard: Artifact) -> None:
    """Raise :class:`~llmfusion.errors.UserError` for a shard of another spec or other inputs than this cache's."""
    of_cache = {key: value for key, value in shard.spec.items() if key != "shard"}
    inputs = {f"models/{spec.model}": teacher.sha256, f"data/mix/{spec.mix}": mix.sha256}
    require(
        of_cache == json.loads(job.spec) and shard.manifest["inputs"] == inputs,
        f"{shard.folder}: was made from other settings or inputs than this cache; remove the folder and run again",
    )


def require_disk_of_cache(
    job: Job, spec: Spec, teacher: Artifact, mix: Artifact, finished: ResumeFolder, shards: int
) -> None:
    """Raise :class:`~llmfusion.errors.UserError` where one of ``shards`` equal shares does not fit on the disk."""
    size = least_bytes(teacher, mix, spec) // shards
    left = max(0, size - finished.size())
    # on one disk a chunk in work/ and in the result is one file
    result, resume = (left, 0) if job.on_same_disk() else (size, left)
    job.require_disk(f"the cache of {spec.model} over {spec.mix}", result, resume)


def least_bytes(teacher: Artifact, mix: Artifact, spec: Spec) -> int:
    """Least size of a cache in bytes: the head, and rows.

    Of a large mix rows are extrapolated from its first samples, less a fifth, so that they are never too many.
    """
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_samples
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher, spec.chat_template)
    samples = islice(read_samples(mix.file("samples.jsonl")), COUNTED_SAMPLES)
    encoded_samples = [encode(sample, tokenizer, mix.facts["max_length"]) for sample in samples]
    rows = sum(len(encoded.label_ids) for encoded in encoded_samples if not isinstance(encoded, str))
    if (total := mix.facts["samples"]) > COUNTED_SAMPLES:
        rows = int(0.8 * rows * total / COUNTED_SAMPLES)
    hidden_size = teacher.facts["hidden_size"] or 0
    head = int(teacher.facts["vocabulary_size"] * state_bytes(spec.capture, hidden_size))
    return head + int(rows * row_bytes(spec.capture, hidden_size))
