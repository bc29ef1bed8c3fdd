"""One cell of a table from stored answers, without torch; programs run in the sandbox."""

import logging
import os
from collections import Counter

from llmfusion.artifacts.job import Job
from llmfusion.data.samples import read_jsonl, wrong_answer
from llmfusion.errors import DamagedError
from llmfusion.evaluation.grading import GRADERS, Item, items_of, program
from llmfusion.evaluation.sandbox import verdicts
from llmfusion.study.kinds.score import Spec

logger = logging.getLogger(__name__)
from llmfusion.reporting.stats import per_cent


def build(job: Job) -> None:
    """Grade every answer; facts: score in per cent with its standard error, k right of n, and the verdicts as 0s and 1s."""
    spec = job.parse(Spec)
    answers = job.input(f"answers/{spec.model}/{spec.batch}")
    items = items_of(job.input(f"data/tasks/{spec.task}"), spec.format)
    file = answers.file(f"{spec.task}.jsonl")
    given = list(read_jsonl(file, wrong_answer))
    if len(given) != len(items):
        raise DamagedError(
            f"{file}: expected an answer to each of {len(items)} items, found {len(given)}; ask again with -R answer"
        )
    if spec.task not in answers.facts["tasks"]:
        raise DamagedError(
            f"{answers.folder}: the manifest does not tell how {spec.task} was asked; ask again with -R answer"
        )
    right, reasons = _run(items, given) if spec.format == "code" else _compare(spec.format, items, given)
    score, error = per_cent(sum(right), len(right))
    job.facts.update(
        score=score, stderr=error, k=sum(right), n=len(right), right="".join("01"[r] for r in right), reasons=reasons, scale=spec.scale,
        asked={**answers.facts["tasks"][spec.task], "backend": answers.facts["backend"], "decoding": answers.facts["decoding"]},
    )  # fmt: skip
    logger.info(
        "%s on %s: %.2f +-%.2f (%d of %d) %s", spec.model, spec.task, score, error, sum(right), len(right), reasons
    )


def _compare(kind: str, items: list[Item], given: list[Item]) -> tuple[list[bool], dict[str, int]]:
    right = [GRADERS[kind](g["answer"], item) for item, g in zip(items, given, strict=True)]
    return right, {"passed": sum(right), "wrong answer": len(right) - sum(right)}


def _run(items: list[Item], given: list[Item]) -> tuple[list[bool], dict[str, int]]:
    tasks = [
        {
            "task_id": str(i["item"]),
            **{k: i[k] for k in ("prompt", "test", "entry_point")},
            "completion": program(g["answer"], i),
        }
        for i, g in zip(items, given, strict=True)
    ]
    found = list(verdicts(tasks, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return [v["passed"] for v in found], dict(sorted(Counter(v["reason"] for v in found).items()))
