import io
import json
import os
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from llmfusion.data import sources
from llmfusion.data.layout import item_layouts, sample_layouts
from llmfusion.errors import UserError
from llmfusion.study.schema.data import HubSource, PathSource
from tests.unit.hub_server import REVISION, Hub, serving

ROWS = [{"problem": f"p{i}", "solution": f"s{i}"} for i in range(5)]


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


SPLITS = {"train": ("data/train-*", 3, 2), "train_1M": ("data/train_1M-*", 2, 1), "test": ("data/test-*", 1, 2)}
READ_EACH = """
import json, sys
from llmfusion.data import sources
from llmfusion.errors import UserError
from llmfusion.study.schema.data import HubSource
for entry in json.loads(sys.stdin.readline()):
    try:
        print(json.dumps(list(sources.rows(HubSource(**entry)))), flush=True)
    except UserError as error:
        print(json.dumps(str(error)), flush=True)
    sys.stdin.readline()  # the test notes what was downloaded
"""


def split_files(name):
    """The Parquet files of a split, by path, and their rows."""
    pattern, count, rows_each = SPLITS[name]
    rows = [[{"problem": f"{name} {i}.{j}"} for j in range(rows_each)] for i in range(count)]
    names = [pattern.replace("*", f"{i:05d}-of-{count:05d}.parquet") for i in range(count)]
    return dict(zip(names, rows, strict=True))


def card(subsets):
    """A README whose table gives each subset's files by split, and numbers of rows of all splits."""
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {subsets[subset]}{SPLITS[split][0]}\n" for split in SPLITS)
        for subset in subsets
    )
    sizes = "".join(
        f"  - name: {name}\n    num_bytes: 9\n    num_examples: {n * k}\n" for name, (_, n, k) in SPLITS.items()
    )
    info = "".join(f"- config_name: {subset}\n  splits:\n{sizes}" for subset in subsets)
    return f"---\nconfigs:\n{configs}dataset_info:\n{info}---\n".encode()


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def read_from_hub(tmp_path, files, asked, repo="owner/set"):
    """What :func:`sources.rows` gives for each entry, and the files downloaded for it, out of a process of its own."""
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "no_proxy": "*"}
    with serving(Hub({"datasets/owner/set": files})) as hub:
        environment = {**os.environ, **cache, "HF_ENDPOINT": hub.url}
        process = subprocess.Popen(
            [sys.executable, "-c", READ_EACH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        out = []
        with process:
            process.stdin.write(json.dumps([hub_source(repo=repo, **entry).model_dump() for entry in asked]) + "\n")
            for _ in asked:
                process.stdin.flush()
                given = json.loads(process.stdout.readline())
                out.append((given, [name for name in hub.downloads() if name.endswith(("parquet", "jsonl"))]))
                hub.requests.clear()
                process.stdin.write("\n")
            process.stdin.flush()
    return out


def test_only_the_files_of_the_split_asked_for_are_downloaded(tmp_path):
    by_split = {name: split_files(name) for name in SPLITS}
    files = {path: parquet(rows) for split in by_split.values() for path, rows in split.items()}
    asked = [{"split": "train_1M"}, {"split": "test[:1]"}, {"split": "nope"}, {"split": "train+test"}]
    found = read_from_hub(tmp_path, {"README.md": card({"default": ""}), **files}, asked)
    first = list(by_split["train_1M"])
    assert found[0] == ([row for rows in by_split["train_1M"].values() for row in rows], first)
    assert found[1] == ([{"problem": "test 0.0"}], list(by_split["test"]))
    assert found[2][0] == "owner/set: there is no split 'nope'; there are: train, train_1M, test"
    assert found[2][1] == []
    assert len(found[3][0]) == 8
    assert set(found[3][1]) <= {*by_split["train"], *by_split["test"]}


def test_only_the_files_that_a_study_names_are_downloaded_one_by_path_or_several_by_pattern(tmp_path):
    by_split = {name: split_files(name) for name in SPLITS}
    files = {path: parquet(rows) for split in by_split.values() for path, rows in split.items()}
    one, two = by_split["train_1M"]
    asked = [
        {"split": "train_1M", "files": "data/train_1M-*.parquet"},
        {"files": [two]},
        {"files": "data/none-*.parquet"},
    ]
    found = read_from_hub(tmp_path, {**files, "other.jsonl": b'{"problem": "no"}\n'}, asked)
    assert found[0] == ([{"problem": "train_1M 0.0"}, {"problem": "train_1M 1.0"}], [one, two])
    assert found[1] == ([{"problem": "train_1M 1.0"}], [])  # it is there already
    assert "owner/set at 0123456789ab" in found[2][0]
    assert found[2][1] == []


def test_several_subsets_follow_each_other_and_their_other_splits_stay_away(tmp_path):
    subsets = {"algebra": "algebra/", "geometry": "geometry/"}
    files = {
        f"{folder}{path}": parquet([{"problem": f"{folder} {split}"}])
        for folder in subsets.values()
        for split in SPLITS
        for path in split_files(split)
    }
    asked = [{"subset": ["geometry", "algebra"], "split": "test"}]
    ((rows, downloaded),) = read_from_hub(tmp_path, {"README.md": card(subsets), **files}, asked)
    assert rows == [{"problem": "geometry/ test"}, {"problem": "algebra/ test"}]
    assert sorted(downloaded) == sorted(name for name in files if "test-" in name)


def test_a_repository_out_of_reach_is_named_with_the_way_out_and_no_folder_of_its_name_is_read(tmp_path, monkeypatch):
    (tmp_path / "owner" / "other").mkdir(parents=True)
    lines(tmp_path / "owner" / "other" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    ((told, downloaded),) = read_from_hub(tmp_path, {}, [{}], "owner/other")
    assert "owner/other at 0123456789ab: could not be loaded: " in told
    assert "Offline, download it elsewhere and use kind: path" in told
    assert downloaded == []


@pytest.mark.parametrize(
    "files",
    [
        "../../etc/passwd",
        "data/../../x.parquet",
        "/etc/passwd",
        "https://example.org/x.parquet",
        "hf://datasets/a/b/x.parquet",
        "file:///etc/passwd",
        "zip://x.jsonl::data.zip",
        "~/x.parquet",
        "a\\b.parquet",
        "",
        "./x.parquet",
        "a//b",
        "a\nb",
        ["data/x.parquet", "../y"],
    ],
)
def test_files_outside_the_repository_are_refused_where_they_enter(files):
    with pytest.raises(ValidationError):
        hub_source(files=files)


@pytest.mark.parametrize(
    "repo", ["../set", "owner/..", "hf:/x", "buckets/x", "a/b@main", "./x", "~/x", "-a/b", "a/b?x"]
)
def test_a_repository_is_an_owner_and_a_name(repo):
    with pytest.raises(ValidationError):
        hub_source(repo=repo)


def test_files_belong_to_one_split():
    with pytest.raises(ValidationError, match="files are those of one split"):
        hub_source(split="train+test", files="a.parquet")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"[" * 100_000, "line 1: nested too deeply"),
        (b'{"text": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001, "line 1: nested too deeply"),
        (b'{"text": "a\x00b"}', "line 1: Invalid control character"),
        (b"\x00" * 50, "line 1: Expecting value"),
        (b'\xff\xfe{"a": 1}', "line 1: .*utf-8"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
        (b'"text"', "line 1: expected a JSON object, got str"),
        (b"", "line 1: Expecting value"),
    ],
)
def test_an_odd_line_is_named_and_no_traceback(tmp_path, line, told):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=told):
        list(sources.rows(path_source(tmp_path / "a.jsonl")))


def test_odd_values_of_parquet_files_are_rows_like_any_other(tmp_path):
    import datetime
    import decimal

    table = pyarrow.table(
        {
            "text": pyarrow.array(["a", None, "c"]).dictionary_encode(),
            "lists": pyarrow.array([[1], [], None]),
            "structs": pyarrow.array([{"x": [1]}, None, {"x": None}]),
            "decimals": pyarrow.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.00")]),
            "nothing": pyarrow.nulls(3),
            "times": pyarrow.array([datetime.datetime(2024, 1, 1), None, None]),
            "bytes": pyarrow.array([b"\xff", None, b""]),
            "nan": pyarrow.array([float("nan"), float("inf"), None]),
            "map": pyarrow.array([[("k", 1)], None, []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = list(sources.rows(path_source(tmp_path / "a.parquet")))
    assert [row["text"] for row in found] == ["a", None, "c"]
    assert found[0]["structs"] == {"x": [1]}
    layout = sample_layouts()["text"]
    rng = random.Random(0)
    for column in table.column_names[1:]:
        converted = [sources.apply_layout("a", lambda r: layout(r, {}, rng), {"text": row[column]}, 0) for row in found]
        assert converted == [None] * 3, column


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"\x00" * 1000])
def test_a_parquet_file_that_is_none_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        list(sources.rows(path_source(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_what_is_no_regular_file_is_not_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is no regular file"):
        list(sources.rows(path_source(tmp_path / name)))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is no regular file"):
        list(sources.rows(path_source(tmp_path / name)))


def test_a_missing_column_is_told_with_those_that_are_there():
    with pytest.raises(UserError, match="repo, row 3: layout needs column 'text'; there are: problem, solution"):
        sources.apply_layout("repo", lambda row: row["text"], ROWS[0], 3)


@pytest.mark.parametrize("value", [None, "three", [], 3.5, {"role": "user"}])
def test_a_value_of_another_type_spoils_its_row_only(value):
    row = {"question": value, "choices": value, "answer": value, "subject": "s"}
    assert sources.apply_layout("repo", item_layouts()["mmlu"], row, 0) is None
