"""Verdicts are kept as they come: a killed run goes on from them, and its result is that of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmfusion.evaluation import verdict_log
from llmfusion.evaluation.verdict_log import resumed_verdicts

TASKS = [
    {"task_id": str(i), "prompt": "", "completion": f"def f(x):\n    return {i}\n", "test": "t", "entry_point": "f"}
    for i in range(5)
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks that were judged; the judge says that even numbers pass."""
    out: list[str] = []

    def judge(tasks: Sequence[dict[str, Any]], jobs: int, timeout: float) -> Iterator[dict[str, Any]]:
        for task in tasks:
            out.append(task["task_id"])
            passed = int(task["task_id"]) % 2 == 0
            yield {"task_id": task["task_id"], "passed": passed, "reason": "passed" if passed else "wrong answer"}

    monkeypatch.setattr(verdict_log, "verdicts", judge)
    return out


def test_only_what_is_missing_is_judged_and_all_is_as_if_undisturbed(tmp_path: Path, asked: list[str]) -> None:
    whole = list(resumed_verdicts(TASKS, 1, 10.0, None))
    log = tmp_path / "log"
    killed = resumed_verdicts(TASKS, 1, 10.0, log)
    asked.clear()
    assert [next(killed), next(killed)] == whole[:2]
    killed.close()
    lines = log.read_bytes()
    for torn in (lines, lines + b'{"task": "', lines[:-7], lines + b"[]\n"):
        log.write_bytes(torn)
        asked.clear()
        assert list(resumed_verdicts(TASKS, 1, 10.0, log)) == whole
        assert asked == (["1", "2", "3", "4"] if torn == lines[:-7] else ["2", "3", "4"])
    asked.clear()
    assert list(resumed_verdicts(TASKS, 1, 10.0, log)) == whole
    assert asked == []


@pytest.mark.parametrize("change", [{"completion": "x"}, {"test": "x"}, {"prompt": "x"}, {"entry_point": "x"}, None])
def test_a_verdict_counts_only_for_the_very_task_and_time_limit(
    tmp_path: Path, asked: list[str], change: dict[str, str] | None
) -> None:
    log = tmp_path / "log"
    list(resumed_verdicts(TASKS, 1, 10.0, log))
    asked.clear()
    changed = [TASKS[0], {**TASKS[1], **(change or {})}, *TASKS[2:]]
    list(resumed_verdicts(changed, 1, 10.0 if change else 5.0, log))
    assert asked == (["1", "2", "3", "4"] if change else ["0", "1", "2", "3", "4"])


def test_what_is_no_verdict_is_judged_again(tmp_path: Path, asked: list[str]) -> None:
    log = tmp_path / "log"
    list(resumed_verdicts(TASKS[:1], 1, 10.0, log))
    row = json.loads(log.read_text())
    for verdict in (None, [], {}, {"passed": 1, "reason": "x"}, {"passed": True}):
        log.write_text(json.dumps({**row, "verdict": verdict}) + "\n")
        asked.clear()
        list(resumed_verdicts(TASKS[:1], 1, 10.0, log))
        assert asked == ["0"]


def test_the_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    slow = "def f(x):\n    import time\n    time.sleep(0.5)\n    return x\n"
    test = "def check(f):\n    assert f(1) == 1\n"
    tasks = [{**task, "completion": slow, "test": test} for task in TASKS]
    (tmp_path / "in").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    command = [sys.executable, "-m", "llmfusion", "sandbox", "in", "out", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    partial = tmp_path / "out.partial"
    while not partial.exists() or partial.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = partial.read_bytes()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert before.count(b"\n") >= 2
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert found == [{"task_id": str(i), "passed": True, "reason": "passed"} for i in range(5)]
    assert not partial.exists()
