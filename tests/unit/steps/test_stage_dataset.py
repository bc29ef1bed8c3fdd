import json

import pytest

from llmfusion.data.samples import read_samples
from llmfusion.errors import UserError
from llmfusion.steps import stage_dataset as dataset
from tests.unit.stand_ins import job


def build(tmp_path, spec, name="job"):
    made = job(tmp_path, {"dataset": spec}, name=name)
    dataset.build(made)
    return list(read_samples(made.folder / "samples.jsonl")), made.facts


def source(tmp_path, rows, **more):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "kind": "path",
        "path": str(tmp_path / "a.jsonl"),
        "layout": "pair",
        "columns": {"prompt": "q", "response": "a"},
        "domain": "math",
        "license": "mit",
        **more,
    }


def test_rows_become_samples_and_what_is_left_out_is_counted(tmp_path):
    rows = [
        {"q": "1", "a": "one"},
        {"q": "2", "a": ""},
        {"q": "1", "a": "one"},
        {"q": "3", "a": None},
        {"q": "4", "a": "four"},
        {"q": "5", "a": "\ud83d"},
    ]
    samples, facts = build(tmp_path, source(tmp_path, rows))
    assert [[m["content"] for m in s["messages"]] for s in samples] == [["1", "one"], ["4", "four"]]
    assert facts["rejected"] == {
        "duplicate": {"count": 1, "first": ["2"]},
        "malformed": {"count": 3, "first": ["1", "3", "5"]},
    }
    assert (facts["samples"], facts["rows"], facts["license"]) == (2, 6, "mit")
    assert {s["domain"] for s in samples} == {"math"}
    assert len({s["id"] for s in samples}) == 2


def test_long_conversations_are_split_into_samples_with_ids_of_their_own(tmp_path):
    turns = [{"from": who, "value": f"{i}{who}"} for i in range(3) for who in ("human", "gpt")]
    samples, facts = build(
        tmp_path, source(tmp_path, [{"conversations": turns}], layout="conversations", split_characters=10)
    )
    assert [s["messages"][0]["content"] for s in samples] == ["0human", "1human", "2human"]
    assert len({s["id"] for s in samples}) == 3
    assert facts["rows"] == 1


def test_a_generated_dataset_is_the_same_every_time_and_its_rows_have_ids(tmp_path):
    spec = {"kind": "generated", "generator": "sums", "form": "chat", "rows": 50, "domain": "gsm"}
    first, facts = build(tmp_path, spec, "one")
    assert first == build(tmp_path, spec, "two")[0]
    assert len({s["id"] for s in first}) == facts["samples"] == facts["rows"] == 50
    assert not {s["id"] for s in first} & {s["id"] for s in build(tmp_path, {**spec, "seed": 1}, "three")[0]}


def test_a_wrong_column_is_told_with_the_columns_there_are(tmp_path):
    with pytest.raises(UserError, match=r"row 0: layout needs column 'q'; there are: question, answer"):
        build(tmp_path, source(tmp_path, [{"question": "1", "answer": "one"}]))


def test_nothing_usable_is_an_error_that_names_the_layout(tmp_path):
    with pytest.raises(UserError, match=r"no usable sample in 2 rows: .*malformed.*layout 'pair'"):
        build(tmp_path, source(tmp_path, [{"q": "", "a": ""}] * 2))
