"""A share of a teacher's cache: finished chunks and their notes, which the job of the whole cache assembles."""

import logging

from llmfusion.artifacts.job import Job
from llmfusion.study.kinds.capture_shard import Spec

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Capture this shard's part of the mix; finished chunks stay in ``work/`` until all are there."""
    from llmfusion.steps.capture_teacher import finished_chunks, require_disk_of_cache
    from llmfusion.teachers.capture import capture_chunks
    from llmfusion.teachers.chunks import Shard, link_chunks

    spec = job.parse(Spec)
    number, count = spec.shard
    teacher = job.input(f"models/{spec.model}")
    mix = job.input(f"data/mix/{spec.mix}")
    finished = finished_chunks(job)
    require_disk_of_cache(job, spec, teacher, mix, finished, count)
    job.mark_started()
    capture_chunks(teacher, mix, spec.capture, spec.chat_template, finished, Shard(number - 1, count))
    notes = link_chunks(finished.folder, job.folder)
    job.facts.update(pieces=len(notes), rows=sum(row["length"] for note in notes for row in note["index"]))
    logger.info("%d chunks, %d rows", job.facts["pieces"], job.facts["rows"])
