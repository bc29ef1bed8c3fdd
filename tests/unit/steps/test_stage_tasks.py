import json

import pytest

from llmfusion.data.samples import read_items
from llmfusion.errors import UserError
from llmfusion.steps import stage_tasks as tasks
from tests.unit.stand_ins import job


def gsm8k(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "path", "path": str(path), "layout": "gsm8k", "license": "mit"}


def test_items_and_shots_are_numbered_and_malformed_rows_counted(tmp_path):
    rows = [
        {"question": "1+1?", "answer": "1+1=2\n#### 2"},
        {"question": "?", "answer": None},
        {"question": "2+2?", "answer": "#### 4"},
    ]
    rows.append({"question": "half a \ud83d", "answer": "#### 5"})
    made = job(
        tmp_path, {"items": gsm8k(tmp_path / "a.jsonl", rows), "shots_from": gsm8k(tmp_path / "b.jsonl", rows[:1])}
    )
    tasks.build(made)
    assert [(i["item"], i["question"], i["answer"]) for i in read_items(made.folder / "items.jsonl")] == [
        (0, "1+1?", "2"),
        (1, "2+2?", "4"),
    ]
    assert [i["solution"] for i in read_items(made.folder / "shots.jsonl")] == ["1+1=2"]
    assert made.facts == {
        "items": 2,
        "items_rejected": {"malformed": {"count": 2, "first": ["1", "3"]}},
        "shots": 1,
        "shots_rejected": {},
        "license": "mit",
    }


def test_generated_items_are_the_held_out_ones(tmp_path):
    made = job(tmp_path, {"items": {"kind": "generated", "generator": "code", "form": "test", "rows": 9}})
    tasks.build(made)
    items = list(read_items(made.folder / "items.jsonl"))
    assert [i["item"] for i in items] == list(range(9))
    assert all({"prompt", "entry_point", "test"} < set(i) for i in items)


def test_no_usable_item_is_an_error_and_a_missing_column_is_named(tmp_path):
    with pytest.raises(UserError, match="no usable test item"):
        tasks.build(job(tmp_path, {"items": gsm8k(tmp_path / "a.jsonl", [{"question": "?", "answer": None}])}))
    with pytest.raises(UserError, match="needs column 'answer'; there are: question, target"):
        tasks.build(job(tmp_path, {"items": gsm8k(tmp_path / "a.jsonl", [{"question": "?", "target": "3"}])}))
