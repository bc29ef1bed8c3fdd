"""``llmfusion sandbox IN.jsonl OUT.jsonl``."""

import json
from pathlib import Path

import pytest

from llmfusion.cli.main import main
from llmfusion.cli.sandbox import FIELDS

TASK = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "completion": "    return x\n",
    "test": "def check(c):\n    assert c(1) == 1\n",
    "entry_point": "f",
}


def files(folder: Path, *lines: str) -> tuple[Path, Path]:
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder / "in.jsonl", folder / "out.jsonl"


def test_one_verdict_a_line_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {**TASK, "task_id": 7, "completion": "    return 0\n"}
    source, target = files(tmp_path, json.dumps(bad), json.dumps(TASK))
    assert main(["sandbox", str(source), str(target), "--jobs", "2", "--timeout", "10"]) == 0
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"task_id": 7, "passed": False, "reason": "wrong answer", "detail": "line 2 of the test: assert c(1) == 1"},
        {"task_id": "HumanEval/0", "passed": True, "reason": "passed"},
    ]
    assert capsys.readouterr().out == "1 of 2 passed\n"


def test_no_tasks_are_no_verdicts(tmp_path: Path) -> None:
    source, target = files(tmp_path)
    assert main(["sandbox", str(source), str(target)]) == 0
    assert target.read_text() == ""


@pytest.mark.parametrize("left_out", FIELDS)
def test_a_missing_field_is_named_with_its_line_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left_out: str
) -> None:
    source, target = files(tmp_path, json.dumps(TASK), json.dumps({k: v for k, v in TASK.items() if k != left_out}))
    assert main(["sandbox", str(source), str(target)]) == 1
    assert capsys.readouterr().err == f"error: {source}, line 2: {left_out} missing\n"
    assert not target.exists()


@pytest.mark.parametrize("line", ["not JSON", "[]", "5", "{"])
def test_what_is_no_task_is_refused_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    source, target = files(tmp_path, line)
    assert main(["sandbox", str(source), str(target)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not target.exists()


def test_missing_files_and_folders_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = files(tmp_path, json.dumps(TASK))
    assert main(["sandbox", str(tmp_path / "absent.jsonl"), str(target)]) == 1
    assert "absent.jsonl: is not there" in capsys.readouterr().err
    assert main(["sandbox", str(source), str(tmp_path / "no/out.jsonl")]) == 1
    assert f"{tmp_path / 'no'}: is no folder" in capsys.readouterr().err


def test_values_that_cannot_be_meant_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = files(tmp_path, json.dumps({**TASK, "completion": None, "test": 3}))
    for words, message in (
        (["--jobs", "0"], "--jobs 0: give at least 1"),
        (["--timeout", "-1"], "--timeout -1: give more than 0"),
        ([], "line 1: completion, test must be text"),
    ):
        assert main(["sandbox", str(source), str(target), *words]) == 1
        assert message in capsys.readouterr().err
    assert not target.exists()
