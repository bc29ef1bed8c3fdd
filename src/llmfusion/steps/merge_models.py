"""Merge the parents' deltas over the pivot (:mod:`llmfusion.merging.engine`)."""

import logging
import shutil

from llmfusion.artifacts.job import Job
from llmfusion.merging.plan import plan_merge
from llmfusion.merging.report import summary, write_card
from llmfusion.study.kinds.merge_models import Spec

logger = logging.getLogger(__name__)
SAME = (
    "architecture",
    "hidden_size",
    "vocabulary_size",
    "vocabulary_sha256",
    "tokenizer_size",
    "eos_token",
    "max_positions",
)  # as the pivot's


def build(job: Job) -> None:
    """Merge; a job that was killed goes on with the next tensor."""
    from llmfusion.merging import engine

    merge = job.parse(Spec).merge
    pivot = job.input(f"models/{merge.pivot}")
    parents = [job.input(f"models/{parent}") for parent in merge.parents]
    work = plan_merge(pivot.folder, [parent.folder for parent in parents], merge)
    place = job.work / "merge"
    kept = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    job.require_disk(
        f"a merge over {merge.pivot}", 0 if job.on_same_disk() else work.written, max(0, work.written - kept)
    )
    facts, _ = engine.run(work, place, job.key)
    write_card(place, merge, merge.pivot, merge.parents, facts)
    for path in sorted(place.iterdir()):
        shutil.move(path, job.folder / path.name)
    place.rmdir()
    job.facts.update({key: pivot.facts[key] for key in SAME} | facts)
    logger.info(summary(facts))
    for remark in [*work.matching.remarks, *([f"warning: {facts['warning']}"] if "warning" in facts else [])]:
        logger.info(remark)
