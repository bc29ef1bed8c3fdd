"""One cell of a table from stored answers, without torch; programs run in the sandbox."""

import logging
import os
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.store import Artifact
from llmfusion.data.samples import read_answers
from llmfusion.errors import DamagedError
from llmfusion.evaluation.items import items_of
from llmfusion.evaluation.task_format import load_format
from llmfusion.evaluation.verdicts import Verdict, count_reasons, grade_answers
from llmfusion.reporting.stats import per_cent
from llmfusion.study.kinds.score import Spec

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Grade every answer. Facts: score in per cent with its standard error, k right of n, the verdicts as 0s and 1s.

    Where the task has a limit also how many of its items were asked.
    """
    spec = job.parse(Spec)
    stored = job.input(f"answers/{spec.model}/{spec.batch}")
    staged = job.input(f"data/tasks/{spec.task}")
    items = items_of(staged, spec.format, limit=spec.limit)
    answers = _answers(stored, spec.task, len(items))
    task_format = load_format(spec.format)
    jobs = int(os.environ.get("OMP_NUM_THREADS", "1"))
    graded = grade_answers(task_format, items, answers, jobs, log=job.work / "verdicts.jsonl")
    right = [verdict.right for verdict in graded]
    score, error = per_cent(sum(right), len(right))
    reasons = count_reasons(task_format, graded)
    asked = {**stored.facts["tasks"][spec.task], **{key: stored.facts[key] for key in ("backend", "decoding")}}
    job.facts.update(
        score=score,
        stderr=error,
        k=sum(right),
        n=len(right),
        right="".join("01"[r] for r in right),
        reasons=reasons,
        scale=spec.scale,
        asked=asked,
    )
    if spec.limit is not None:
        job.facts["limit"] = {"asked": len(items), "of": staged.facts["items"]}
    _note_unsupported(spec, graded, job.facts)
    _log_cell(spec, job.facts)


def _note_unsupported(spec: Spec, graded: list[Verdict], facts: dict[str, Any]) -> None:
    """Say which items no answer can get right here, because their tests cannot be run: no failure of the model."""
    numbers = [number for number, verdict in enumerate(graded) if not verdict.is_supported]
    if numbers:
        facts["unsupported"] = numbers
        first = graded[numbers[0]].reason
        logger.warning(
            "%s: %d of %d items count as not right for every model, first item %d: %s",
            spec.task, len(numbers), len(graded), numbers[0], first,
        )  # fmt: skip


def _log_cell(spec: Spec, facts: dict[str, Any]) -> None:
    figures = (facts[key] for key in ("score", "stderr", "k", "n", "reasons"))
    limit = "; asked {asked} of the test's {of} items".format(**facts["limit"]) if "limit" in facts else ""
    logger.info("%s on %s: %.2f +-%.2f (%d of %d) %s%s", spec.model, spec.task, *figures, limit)


def _answers(stored: Artifact, task: str, count: int) -> list[str]:
    """The texts of the stored answers. Raises :class:`DamagedError` where there are not ``count``."""
    path = stored.file(f"{task}.jsonl")
    answers = [row["answer"] for row in read_answers(path)]
    if len(answers) != count:
        raise DamagedError(
            f"{path}: expected an answer to each of {count} items, found {len(answers)}; ask again with -R answer"
        )
    if task not in stored.facts["tasks"]:
        raise DamagedError(
            f"{stored.folder}: the manifest does not tell how {task} was asked; ask again with -R answer"
        )
    return answers
