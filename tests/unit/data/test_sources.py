import json

import pyarrow
import pyarrow.parquet
import pytest

from llmfusion.data import sources
from llmfusion.data.layout import item_layouts
from llmfusion.errors import UserError
from llmfusion.study.schema.data import HubSource, PathSource

ROWS = [{"problem": f"p{i}", "solution": f"s{i}"} for i in range(5)]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def path_source(path):
    return PathSource(kind="path", path=str(path), layout="text", license="mit")


def hub_source(**changed):
    entry = {"kind": "hub", "repo": "owner/set", "revision": REVISION, "layout": "text", "license": "mit"}
    return HubSource(**{**entry, **changed})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path_source(path)


def test_jsonl_and_parquet_files_give_their_rows_in_order(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(sources.rows(lines(tmp_path / "a.jsonl", ROWS))) == ROWS
    assert list(sources.rows(path_source(tmp_path / "a.parquet"))) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl: is not there"),
        ("a.csv", "x", r"a file of samples is .jsonl or .parquet"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: "),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1: .*utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(sources.rows(path_source(tmp_path / name)))


def test_the_origin_follows_the_content_of_a_file_and_the_commit_of_a_repository(tmp_path):
    first = sources.origin(lines(tmp_path / "a.jsonl", ROWS))
    assert sources.origin(lines(tmp_path / "b.jsonl", ROWS)) == first
    assert sources.origin(lines(tmp_path / "a.jsonl", ROWS[:-1])) != first
    changes = ({}, {"revision": "f" * 40}, {"split": "test"}, {"subset": "x"}, {"files": "f"}, {"repo": "a/c"})
    assert len({sources.origin(hub_source(**change)) for change in changes}) == 6


@pytest.fixture
def _repository(tmp_path, monkeypatch):
    """A dataset repository at its id below the current folder, where the hub's client finds it without a network."""
    import datasets

    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    lines(folder / "train.jsonl", ROWS)
    lines(folder / "test.jsonl", ROWS[:2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("_repository")
def test_a_repository_gives_the_rows_of_the_split_or_file_asked_for():
    assert list(sources.rows(hub_source())) == ROWS
    assert list(sources.rows(hub_source(split="test"))) == ROWS[:2]
    assert list(sources.rows(hub_source(files="test.jsonl"))) == ROWS[:2]


def test_several_subsets_follow_each_other(monkeypatch):
    import datasets

    loaded = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda repo, name, **_: loaded.append((repo, name)) or [{"from": name}]
    )
    rows = list(sources.rows(hub_source(subset=["algebra", "geometry"])))
    assert rows == [{"from": "algebra"}, {"from": "geometry"}]
    assert loaded == [("owner/set", "algebra"), ("owner/set", "geometry")]


@pytest.mark.usefixtures("_repository")
def test_a_repository_out_of_reach_is_named_with_the_way_out():
    with pytest.raises(
        UserError,
        match=r"owner/other at 0123456789ab: could not be loaded: .*Offline, download it elsewhere and use kind: path",
    ):
        list(sources.rows(hub_source(repo="owner/other")))


def test_a_missing_column_is_told_with_those_that_are_there():
    with pytest.raises(UserError, match="repo, row 3: layout needs column 'text'; there are: problem, solution"):
        sources.apply_layout("repo", lambda row: row["text"], ROWS[0], 3)


@pytest.mark.parametrize("value", [None, "three", [], 3.5, {"role": "user"}])
def test_a_value_of_another_type_spoils_its_row_only(value):
    row = {"question": value, "choices": value, "answer": value, "subject": "s"}
    assert sources.apply_layout("repo", item_layouts()["mmlu"], row, 0) is None
