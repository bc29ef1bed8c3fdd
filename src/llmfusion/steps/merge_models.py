"""Merge the parents' deltas over the pivot (:mod:`llmfusion.merging.engine`)."""

import logging
import shutil

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited, licence_lines
from llmfusion.merging.plan import plan_merge
from llmfusion.merging.report import summary, write_card
from llmfusion.study.kinds.merge_models import Spec

logger = logging.getLogger(__name__)
FACTS_OF_PIVOT = (
    "architecture",
    "hidden_size",
    "vocabulary_size",
    "vocabulary_sha256",
    "tokenizer_size",
    "eos_token",
    "max_positions",
)


def build(job: Job) -> None:
    """Merge; a job that was killed goes on with the next tensor."""
    from llmfusion.merging import engine

    options = job.parse(Spec).merge
    pivot = job.input(f"models/{options.pivot}")
    parents = [job.input(f"models/{parent}") for parent in options.parents]
    plan = plan_merge(pivot.folder, [parent.folder for parent in parents], options)
    resumed = job.work / "merge"
    written = sum(path.stat().st_size for path in resumed.glob("*.safetensors"))
    job.require_disk(
        f"a merge over {options.pivot}",
        0 if job.on_same_disk() else plan.bytes_written,
        max(0, plan.bytes_written - written),
    )
    facts, _ = engine.run(plan, resumed, job.key)
    licences = inherited(job.inputs)
    write_card(resumed, options, options.pivot, options.parents, facts, licence_lines(licences))
    for path in sorted(resumed.iterdir()):
        shutil.move(path, job.folder / path.name)
    resumed.rmdir()
    job.facts.update({key: pivot.facts[key] for key in FACTS_OF_PIVOT} | facts, license=licences)
    logger.info("%s", summary(facts))
    for remark in plan.matching.remarks:
        logger.info("%s", remark)
    if "warning" in facts:
        logger.warning("warning: %s", facts["warning"])
