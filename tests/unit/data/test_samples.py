import hashlib

import pytest

from llmfusion.data.samples import read_answers, read_items, read_samples, sample_id, text_of
from llmfusion.errors import DamagedError
from llmfusion.io.jsonl import write_jsonl


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


def test_text_of_joins_all_turns():
    assert text_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == "a\nb"
    assert text_of({"text": "t"}) == "t"


USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("read", "good", "bad", "message"),
    [
        (read_samples, {"id": "1", "text": "t"}, {"text": "t"}, "id: expected text, found None"),
        (read_samples, {"id": "1", "messages": [USER, ASSISTANT]}, {"id": "2"}, "expected text or a list of messages"),
        (read_samples, {"id": "1", "text": "t"}, {"id": "2", "messages": [USER]}, "expected the last message to be"),
        (read_samples, {"id": "1", "text": "t"}, {"id": "2", "text": "\ud83d"}, "text: expected text, found half a"),
        (read_items, {"item": 0, "question": "q"}, {"item": 2, "question": "q"}, "expected item 1, found 2"),
        (read_items, {"item": 0, "question": "q"}, {"item": 1, "question": None}, "question: expected a value"),
        (read_items, {"item": 0}, {"item": 1, "question": "\ud83d"}, "expected text, found half a surrogate pair"),
        (read_answers, {"item": 0, "prompt": "p", "answer": "a"}, {"item": 1, "prompt": "p"}, "answer: expected text"),
        (read_answers, {"item": 0, "prompt": "p", "answer": ""}, {"item": 1, "answer": ""}, "prompt: expected text"),
    ],
)
def test_a_row_that_is_not_what_the_file_holds_is_named_with_its_line(tmp_path, read, good, bad, message):
    write_jsonl(tmp_path / "a", [good])
    assert list(read(tmp_path / "a")) == [good]
    write_jsonl(tmp_path / "a", [good, bad])
    with pytest.raises(DamagedError, match=rf"a, line 2: {message}"):
        list(read(tmp_path / "a"))
