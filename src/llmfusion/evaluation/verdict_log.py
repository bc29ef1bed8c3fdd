"""Verdicts as they come, in a file, so that a killed run goes on from them."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmfusion.evaluation.sandbox import verdicts

LONGEST = 2**20  # bytes of a line that is read
RULES = 2  # raised when the same program may get another verdict


def resumed_verdicts(
    tasks: Sequence[dict[str, Any]], jobs: int, timeout: float, log: Path | None
) -> Iterator[dict[str, Any]]:
    """Verdicts of all tasks in their order, see :func:`llmfusion.evaluation.sandbox.verdicts`.

    Those that ``log`` holds of the same tasks are taken from it, all others are appended to it, each as it comes. The
    file stays: whoever has the results in place removes it. None: nothing is kept.
    """
    if log is None:
        yield from verdicts(tasks, jobs, timeout)
        return
    done = _read(log, tasks, timeout)
    for verdict, task in zip(done, tasks, strict=False):
        yield {"task_id": task["task_id"], **verdict}
    rest = tasks[len(done) :]
    if not rest:
        return
    with open(log, "a", encoding="ascii") as file:
        for task, verdict in zip(rest, verdicts(rest, jobs, timeout), strict=True):
            told = {key: value for key, value in verdict.items() if key != "task_id"}
            file.write(line_of(_key(task, timeout), told))
            file.flush()
            yield verdict


def _read(log: Path, tasks: Sequence[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """The verdicts in the file that are of these tasks; what does not fit, as a line cut short, is cut off.

    What is no file, or a link to one, makes room for one.
    """
    if log.is_symlink() or not log.is_file():
        if log.is_dir() and not log.is_symlink():
            shutil.rmtree(log)
        else:
            log.unlink(missing_ok=True)
        return []
    found = []
    size = 0
    with open(log, "r+b") as file:
        for task in tasks:
            line = file.readline(LONGEST)
            verdict = _verdict_of(line, _key(task, timeout))
            if verdict is None:
                break
            found.append(verdict)
            size += len(line)
        file.truncate(size)
    return found


def _verdict_of(line: bytes, key: str) -> dict[str, Any] | None:
    """The verdict of a line of this task, which must be as it was written; None for any other."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("verdict"), dict):
        return None
    return row["verdict"] if line_of(key, row["verdict"]).encode() == line else None


def line_of(key: str, verdict: dict[str, Any]) -> str:
    """A line of the file, with a checksum over task and verdict."""
    checksum = hashlib.sha256(json.dumps([key, verdict]).encode()).hexdigest()
    return json.dumps({"task": key, "verdict": verdict, "checksum": checksum}) + "\n"


def _key(task: dict[str, Any], timeout: float) -> str:
    """What a verdict depends on."""
    parts = [RULES, timeout, *(task[part] for part in ("prompt", "completion", "test", "entry_point"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
