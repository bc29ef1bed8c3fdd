import pytest

from llmfusion.errors import DamagedError
from llmfusion.io.jsonl import LineIndex, read_jsonl, write_jsonl

ROWS = [{"text": "é\n" * n, "n": n} for n in range(7)]


def test_rows_survive_the_file_and_are_found_in_any_order(tmp_path):
    assert write_jsonl(tmp_path / "a", ROWS) == 7
    assert list(read_jsonl(tmp_path / "a")) == ROWS
    assert (tmp_path / "a").read_bytes().isascii()
    index = LineIndex(tmp_path / "a")
    assert len(index) == 7
    assert list(index.rows([6, 0, 3, 3])) == [(i, ROWS[i]) for i in (6, 0, 3, 3)]


def test_the_index_counts_bytes_not_characters(tmp_path):
    (tmp_path / "a").write_text('{"text": "日本"}\n{"text": "b"}\n', encoding="utf-8")
    assert [row["text"] for _, row in LineIndex(tmp_path / "a").rows([1, 0])] == ["b", "日本"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "expected an object, found list"),
        (b'{"a": ', "expected a JSON object in UTF-8: "),
        (b'{"a": "\xff"}', "expected a JSON object in UTF-8: "),
        (b'{"a": NaN}', "expected a JSON object in UTF-8: NaN is no number of JSON"),
        (b'{"a": 1}', "line with number 1"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_number(tmp_path, line, message):
    (tmp_path / "a").write_bytes(b'{"b": 1}\n' + line + b"\n")

    def check(row, number):
        return None if "b" in row else f"line with number {number}"

    with pytest.raises(DamagedError, match=rf"a, line 2: {message}"):
        list(read_jsonl(tmp_path / "a", check))
    with pytest.raises(DamagedError, match=rf"a, line 2: {message}"):
        list(LineIndex(tmp_path / "a", check).rows([0, 1]))
    assert list(LineIndex(tmp_path / "a", check).rows([0])) == [(0, {"b": 1})]
