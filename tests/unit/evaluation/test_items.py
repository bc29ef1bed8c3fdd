"""The items of a staged task that are asked."""

from pathlib import Path

import pytest

from llmfusion.evaluation.items import items_of
from llmfusion.io.jsonl import write_jsonl
from tests.unit.stand_ins import artifact

SUBJECTS = ["algebra"] * 5 + ["biology"] * 10 + ["chemistry"] * 5


@pytest.mark.parametrize(
    ("limit", "asked"),
    [
        (None, list(range(20))),
        (4, [0, 5, 10, 15]),
        (3, [0, 6, 13]),
        (1, [0]),
        (19, list(range(19))),
        (20, list(range(20))),
        (21, list(range(20))),
    ],
)
def test_a_limit_takes_items_spread_evenly_over_the_test(tmp_path: Path, limit: int | None, asked: list[int]) -> None:
    items = [{"item": i, "question": f"q{i}", "answer": str(i), "subject": s} for i, s in enumerate(SUBJECTS)]
    task = artifact(tmp_path, items=write_jsonl(tmp_path / "items.jsonl", items))
    found = items_of(artifact(tmp_path, **task.facts), "number", limit=limit)
    assert [int(item["answer"]) for item in found] == asked
    assert [item["item"] for item in found] == list(range(len(asked)))  # answers are numbered by their line
