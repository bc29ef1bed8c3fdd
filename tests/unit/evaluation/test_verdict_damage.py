"""Verdicts that a killed run left, damaged in every way: the run ends with the same verdicts."""

import json
import os
import signal
from pathlib import Path

import pytest

from llmfusion.evaluation import verdict_log
from llmfusion.evaluation.verdict_log import resumed_verdicts
from tests.damages import OF_A_FILE, Damage

TASKS = [{"task_id": str(i), "prompt": "", "test": "", "entry_point": "f", "completion": f"{i}"} for i in range(6)]


def judged(tasks, jobs, timeout):
    for task in tasks:
        right = int(task["completion"]) % 2 == 0
        yield {"task_id": task["task_id"], "passed": right, "reason": "passed" if right else "wrong answer"}


@pytest.fixture(autouse=True)
def _without_a_sandbox(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verdict_log, "verdicts", judged)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for ever"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def lines(path, change):
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def swapped(content):
    rows = [json.loads(line) for line in content]
    rows[1]["verdict"], rows[2]["verdict"] = rows[2]["verdict"], rows[1]["verdict"]
    return [json.dumps(row).encode() + b"\n" for row in rows]


DAMAGES: dict[str, Damage] = {
    **OF_A_FILE,
    "a verdict turned round": lambda path: lines(path, lambda c: [line.replace(b"false", b"true") for line in c]),
    "another reason": lambda path: lines(path, lambda c: [line.replace(b"wrong answer", b"time") for line in c]),
    "verdicts swapped": lambda path: lines(path, swapped),
    "lines swapped": lambda path: lines(path, lambda c: [c[1], c[0], *c[2:]]),
    "a line twice": lambda path: lines(path, lambda c: [c[0], *c]),
    "a deep line": lambda path: lines(path, lambda c: [b"[" * 100_000 + b"\n", *c]),
    "no checksum": lambda path: lines(path, lambda c: [line.split(b', "checksum"')[0] + b"}\n" for line in c]),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_run_goes_on_from_damaged_verdicts_to_the_same_ones(tmp_path: Path, name: str) -> None:
    log = tmp_path / "verdicts.jsonl"
    expected = list(judged(TASKS, 1, 1.0))
    first = resumed_verdicts(TASKS, 1, 1.0, log)
    assert [next(first) for _ in range(4)] == expected[:4]
    first.close()
    DAMAGES[name](log)
    assert list(resumed_verdicts(TASKS, 1, 1.0, log)) == expected
    assert list(resumed_verdicts(TASKS, 1, 1.0, log)) == expected
    assert not log.is_symlink()
