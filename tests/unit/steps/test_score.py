"""Cells from stored answers: facts, and answers that cannot be graded."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts.job import Job
from llmfusion.errors import DamagedError
from llmfusion.evaluation import verdict_log
from llmfusion.io.jsonl import write_jsonl
from llmfusion.steps import score
from tests.unit.stand_ins import artifact, job

FUNCTION = {
    "prompt": 'def f(x):\n    """Double."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "f",
}
ITEMS: dict[str, list[dict[str, Any]]] = {
    "letter": [{"question": "q", "choices": ["red", "blue"], "answer": i % 2} for i in range(3)],
    "number": [{"question": "q", "answer": "5"}] * 3,
    "boxed": [{"question": "q", "answer": "\\frac{1}{2}"}] * 3,
    "code": [FUNCTION] * 3,
}
ANSWERS = {
    "letter": ["The answer is A", "blue", "B"],
    "number": ["#### 5", "#### 6", "none"],
    "boxed": ["\\boxed{1/2}", "1/2", "\\boxed{2}"],
    "code": ["    return 2 * x\n", "```python\ndef f(x):\n    return x + x\n```", "    return x\n"],
}
RIGHT = {"letter": "110", "number": "100", "boxed": "100", "code": "110"}


def scored(
    tmp_path: Path,
    name: str,
    answers: list[str],
    items: list[dict[str, Any]],
    spec: dict[str, Any] | None = None,
    **facts: Any,
) -> Job:
    """The job of a score, run on these answers to these items."""
    for folder in ("answers", "task"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_jsonl(tmp_path / "task/items.jsonl", ({"item": i, **item} for i, item in enumerate(items)))
    rows = ({"item": i, "prompt": "p", "answer": answer} for i, answer in enumerate(answers))
    write_jsonl(tmp_path / "answers/quiz.jsonl", rows)
    facts = {"tasks": {"quiz": {"items": 3, "format": name}}, "backend": "lm-eval", "decoding": "greedy"} | facts
    inputs = {
        "answers/base/pivot/all": artifact(tmp_path / "answers", **facts),
        "data/tasks/quiz": artifact(tmp_path / "task", items=len(items)),
    }
    whole = {
        "model": "base/pivot",
        "task": "quiz",
        "format": name,
        "batch": "all",
        "scale": "miniature",
        **(spec or {}),
    }
    made = job(tmp_path, whole, inputs)
    score.build(made)
    return made


@pytest.mark.parametrize("name", ITEMS)
def test_a_cell_tells_the_score_and_every_verdict(tmp_path: Path, name: str) -> None:
    facts = scored(tmp_path, name, ANSWERS[name], ITEMS[name]).facts
    right = RIGHT[name].count("1")
    assert (facts["right"], facts["k"], facts["n"]) == (RIGHT[name], right, 3)
    assert facts["score"] == pytest.approx(100 * right / 3, abs=0.01)
    assert facts["reasons"] == {"passed": right, "wrong answer": 3 - right}
    assert facts["scale"] == "miniature"
    assert facts["asked"] == {"items": 3, "format": name, "backend": "lm-eval", "decoding": "greedy"}


def test_a_cell_with_a_limit_tells_how_many_of_how_many_items_were_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    items = [{"question": "q", "answer": str(i)} for i in range(9)]
    facts = scored(tmp_path, "number", ["#### 0", "#### 4", "#### 6"], items, {"limit": 3}).facts
    assert (facts["right"], facts["k"], facts["n"]) == ("101", 2, 3)  # items 0, 3 and 6
    assert facts["limit"] == {"asked": 3, "of": 9}
    assert "(2 of 3)" in caplog.text
    assert "asked 3 of the test's 9 items" in caplog.text
    assert "limit" not in scored(tmp_path / "all", "number", ANSWERS["number"], ITEMS["number"]).facts


def test_comparisons_count_both_reasons_and_programs_those_there_are(tmp_path: Path) -> None:
    assert scored(tmp_path / "a", "number", ["5"], ITEMS["number"][:1]).facts["reasons"] == {
        "passed": 1,
        "wrong answer": 0,
    }
    crash = ["    raise ValueError\n", "    import os\n    os._exit(0)\n"]
    reasons = scored(tmp_path / "b", "code", crash, [FUNCTION] * 2).facts["reasons"]
    assert json.dumps(reasons) == '{"ValueError": 1, "the program ended": 1}'


def test_an_item_whose_test_cannot_be_run_is_listed_and_costs_no_other_verdict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {**FUNCTION, "test": "def check(f):\n    assert f(object()) == 4\n"}
    facts = scored(tmp_path, "code", ["    return 2 * x\n"] * 3, [FUNCTION, odd, FUNCTION]).facts
    assert (facts["right"], facts["k"], facts["n"], facts["unsupported"]) == ("101", 2, 3, [1])
    assert facts["reasons"] == {"passed": 2, "test not supported": 1}
    assert "quiz: 1 of 3 items count as not right for every model, first item 1: test not supported: " in caplog.text
    assert "unsupported" not in scored(tmp_path / "b", "code", ["    return 2 * x\n"], [FUNCTION]).facts


def test_a_score_goes_on_from_the_verdicts_of_a_killed_one(tmp_path: Path) -> None:
    whole = scored(tmp_path / "a", "code", ANSWERS["code"], ITEMS["code"])
    log = whole.work / "verdicts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    killed = tmp_path / "b" / log.relative_to(tmp_path / "a")
    killed.parent.mkdir(parents=True)
    # the second says that it failed in a way that only this file can tell: it is believed, and the third is judged
    told = json.loads(lines[1])["verdict"] | {"passed": False, "reason": "x"}
    killed.write_bytes(lines[0] + verdict_log.line_of(json.loads(lines[1])["task"], told).encode())
    facts = scored(tmp_path / "b", "code", ANSWERS["code"], ITEMS["code"]).facts
    assert facts["reasons"] == {"passed": 1, "wrong answer": 1, "x": 1}
    killed.write_bytes(lines[0] + lines[1][:20])
    assert scored(tmp_path / "b", "code", ANSWERS["code"], ITEMS["code"]).facts == whole.facts
    assert killed.read_bytes() == b"".join(lines)


def test_answers_that_are_not_one_an_item_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="expected an answer to each of 3 items, found 2; ask again with -R answer"):
        scored(tmp_path, "number", ANSWERS["number"][:2], ITEMS["number"])


def test_answers_without_a_note_of_how_they_were_asked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="does not tell how quiz was asked; ask again with -R answer"):
        scored(tmp_path, "number", ANSWERS["number"], ITEMS["number"], tasks={})


def test_an_item_that_the_format_cannot_use_is_named_with_its_line(tmp_path: Path) -> None:
    items = [*ITEMS["number"][:2], {"question": "q", "answer": 5}]
    with pytest.raises(
        DamagedError, match=r"items\.jsonl, line 3: answer: a task of format 'number' needs str, found 5"
    ):
        scored(tmp_path, "number", ANSWERS["number"], items)
