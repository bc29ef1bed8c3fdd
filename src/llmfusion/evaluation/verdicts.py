"""Answers to verdicts: compared with their items, or run as programs in the sandbox. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmfusion.evaluation.judge import NOT_SUPPORTED
from llmfusion.evaluation.task_format import Item, TaskFormat
from llmfusion.evaluation.verdict_log import resumed_verdicts

PASSED = "passed"
WRONG = "wrong answer"


class Verdict(NamedTuple):
    """Whether an answer is right, why (``passed``, ``wrong answer``, how a program failed), and what counted of it."""

    right: bool
    reason: str
    extracted: str | None

    @property
    def is_supported(self) -> bool:
        """Whether the item's test could judge at all: where it could not, the answer may be right."""
        return not self.reason.startswith(NOT_SUPPORTED)


def grade_answers(
    task_format: TaskFormat,
    items: Sequence[Item],
    answers: Sequence[str],
    jobs: int = 1,
    timeout: float = 10.0,
    log: Path | None = None,
) -> list[Verdict]:
    """A verdict for the answer to each item.

    ``jobs`` (sandboxes at a time), ``timeout`` (seconds a program) and ``log`` (where verdicts are kept as they come,
    and taken from after a kill) are for formats that run programs; for these :class:`UserError` is raised where there
    is no sandbox. An item whose own test is broken or not supported fails with a reason that says so.
    """
    extracted = [task_format.extracted(answer, item) for item, answer in zip(items, answers, strict=True)]
    if task_format.grade is None:
        judged = _run(items, extracted, jobs, timeout, log)
        return [Verdict(v["passed"], v["reason"], text) for v, text in zip(judged, extracted, strict=True)]
    right = [task_format.grade(answer, item) for item, answer in zip(items, answers, strict=True)]
    return [Verdict(r, PASSED if r else WRONG, text) for r, text in zip(right, extracted, strict=True)]


def count_reasons(task_format: TaskFormat, graded: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts have each reason, sorted by reason.

    Compared answers have one of two; both are there also where 0. Tests that are not supported count as one reason.
    """
    counts = Counter() if task_format.runs_programs else Counter({PASSED: 0, WRONG: 0})
    counts.update(v.reason if v.is_supported else NOT_SUPPORTED.rstrip(": ") for v in graded)
    return dict(sorted(counts.items()))


def _run(
    items: Sequence[Item], programs: Sequence[str | None], jobs: int, timeout: float, log: Path | None
) -> list[dict[str, Any]]:
    tasks = [
        {
            "task_id": str(number),
            **{key: item[key] for key in ("prompt", "test", "entry_point")},
            "completion": completion,
        }
        for number, (item, completion) in enumerate(zip(items, programs, strict=True))
    ]
    return list(resumed_verdicts(tasks, jobs, timeout, log))
