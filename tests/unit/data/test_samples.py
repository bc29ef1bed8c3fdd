import hashlib

from llmfusion.data.samples import LineIndex, read_jsonl, sample_id, text_of, write_jsonl

ROWS = [{"text": "é\n" * n, "n": n} for n in range(7)]


def test_an_id_hashes_origin_row_and_text_only():
    body = '[{"role": "user", "content": "\\u00e9"}]'
    expected = hashlib.sha1(f"repo@1\n7\n{body}".encode()).hexdigest()
    assert sample_id("repo@1", 7, {"messages": [{"role": "user", "content": "é"}], "domain": "any"}) == expected
    others = [
        sample_id("repo@2", 7, {"text": "t"}),
        sample_id("repo@1", 8, {"text": "t"}),
        sample_id("repo@1", 7, {"text": "u"}),
    ]
    assert sample_id("repo@1", 7, {"text": "t"}) not in others


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


def test_text_of_joins_all_turns():
    assert text_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == "a\nb"
    assert text_of({"text": "t"}) == "t"
