"""``llmfusion grade FORMAT IN.jsonl OUT.jsonl``."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.cli.main import main
from tests.unit.steps.test_score import ANSWERS, ITEMS, RIGHT, scored

LINE = {"item": ITEMS["letter"][0], "answer": "A"}


def files(folder: Path, *lines: str) -> tuple[str, str]:
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder / "in.jsonl"), str(folder / "out.jsonl")


def graded(folder: Path, name: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    source, target = files(folder, *map(json.dumps, rows))
    assert main(["grade", name, source, target]) == 0
    return [json.loads(line) for line in Path(target).read_text().splitlines()]


@pytest.mark.parametrize("name", ITEMS)
def test_verdicts_are_those_of_the_score_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    rows = [{"item": item, "answer": answer} for item, answer in zip(ITEMS[name], ANSWERS[name], strict=True)]
    verdicts = graded(tmp_path, name, *rows)
    assert "".join("01"[v["right"]] for v in verdicts) == RIGHT[name]
    assert RIGHT[name] == scored(tmp_path, name, ANSWERS[name], ITEMS[name]).facts["right"]
    assert [v["item"] for v in verdicts] == ITEMS[name]
    assert capsys.readouterr().out == f"{RIGHT[name].count('1')} of 3 right\n"


def test_what_counted_of_an_answer_is_told(tmp_path: Path) -> None:
    assert graded(tmp_path, "letter", LINE, {**LINE, "answer": "no idea"}) == [
        {"item": LINE["item"], "right": True, "extracted": "A"},
        {"item": LINE["item"], "right": False, "extracted": None},
    ]
    [verdict] = graded(tmp_path, "code", {"item": ITEMS["code"][0], "answer": "```\n    return 2 * x\n```"})
    assert (verdict["right"], verdict["extracted"]) == (True, "    return 2 * x\n")


def test_no_answers_are_no_verdicts(tmp_path: Path) -> None:
    assert graded(tmp_path, "number") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not JSON", "expected a JSON object in UTF-8"),
        ("[]", "expected an object, found list"),
        ("{}", "item and answer missing; a line holds item (an object) and answer (text)"),
        ('{"item": {}}', "answer missing"),
        ('{"answer": "A"}', "item missing"),
        ('{"item": {}, "answer": null}', "answer: expected text, found None"),
        ('{"item": 3, "answer": "A"}', "item: expected an object with the item's fields, found 3"),
        (
            '{"item": {"question": "q"}, "answer": "A"}',
            "item: choices: a task of format 'letter' needs list, found None",
        ),
        (
            '{"item": {"question": "q", "choices": ["a"], "answer": 1}, "answer": "A"}',
            "item: answer: expected the number of one of 1 choices (10 at most), found 1",
        ),
    ],
)
def test_a_line_that_cannot_be_graded_is_named_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source, target = files(tmp_path, json.dumps(LINE), line)
    assert main(["grade", "letter", source, target]) == 1
    assert capsys.readouterr().err.startswith(f"error: {source}, line 2: {message}")
    assert not Path(target).exists()


def test_an_unknown_format_is_told_with_the_nearest_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = files(tmp_path, json.dumps(LINE))
    assert main(["grade", "leter", source, target]) == 2
    assert capsys.readouterr().err == "error: there is no task format 'leter'; did you mean 'letter'?\n"
    assert main(["grade", "essay", source, target]) == 2
    assert "there are: boxed, code, letter, number" in capsys.readouterr().err
    assert not Path(target).exists()


def test_missing_files_and_limits_that_cannot_be_meant_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = files(tmp_path, json.dumps(LINE))
    for words, message in (
        ([str(tmp_path / "absent.jsonl"), target], "absent.jsonl: is not there"),
        ([source, str(tmp_path / "no/out.jsonl")], f"{tmp_path / 'no'}: is no folder; make it first"),
        ([source, target, "--jobs", "0"], "--jobs 0: give at least 1"),
        ([source, target, "--timeout", "0"], "--timeout 0: give more than 0"),
    ):
        assert main(["grade", "letter", *words]) == 1
        assert message in capsys.readouterr().err


def test_a_broken_test_of_an_item_is_told_and_costs_no_other_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    item = ITEMS["code"][0]
    rows = [{"item": one, "answer": "    return 2 * x\n"} for one in (item, {**item, "test": "def check(f:\n"}, item)]
    found = graded(tmp_path, "code", *rows)
    assert [row["right"] for row in found] == [True, False, True]
    assert found[1]["reason"].startswith("test not supported: its prompt or its test is no proper program (SyntaxError")
    assert "warning: 1 of 3 tests cannot be run here, which says nothing about" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
