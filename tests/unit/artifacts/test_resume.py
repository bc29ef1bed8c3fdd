"""Files that survive a kill, each with its note."""

import json
import logging

import pytest

from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import sha256_file

NAME = "rows.safetensors"


def write(content):
    return lambda path: path.write_bytes(content) and None


def test_a_note_is_written_last_and_says_what_was_written(tmp_path):
    folder = ResumeFolder(tmp_path, "key")
    folder.put(NAME, write(b"rows"), {"more": 1})
    note = json.loads((tmp_path / "rows.json").read_bytes())
    assert note.pop("note_sha256") == digest(canonical(note))
    assert note == {"key": "key", "name": NAME, "size": 4, "sha256": sha256_file(tmp_path / NAME), "more": 1}
    assert folder.has(NAME)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o644
    other = ResumeFolder(tmp_path, "other")
    assert not other.has(NAME)
    assert (other.size(), folder.size()) == (0, sum(path.stat().st_size for path in tmp_path.iterdir()))
    other.remove_others()
    assert list(tmp_path.iterdir()) == []


def test_a_note_alone_says_that_there_was_nothing_to_write(tmp_path):
    folder = ResumeFolder(tmp_path, "key")
    folder.put(NAME, None, {"index": []})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert folder.has(NAME)
    assert folder.note(NAME) == {"key": "key", "name": NAME, "sha256": None, "index": []}


def test_a_file_that_could_not_be_written_leaves_nothing_and_does_not_count(tmp_path):
    folder = ResumeFolder(tmp_path, "key")

    def full(path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.put(NAME, full, {})
    assert list(tmp_path.iterdir()) == []
    assert not folder.has(NAME)


@pytest.mark.parametrize("content", [None, b"ROWS"], ids=["missing", "damaged"])
def test_a_file_that_is_missing_or_damaged_is_removed_with_its_note(tmp_path, caplog, content):
    caplog.set_level(logging.INFO)
    folder = ResumeFolder(tmp_path, "key")
    folder.put(NAME, write(b"rows"), {})
    (tmp_path / NAME).unlink()
    if content:
        (tmp_path / NAME).write_bytes(content)
    assert not folder.has(NAME)
    assert caplog.messages == [f"{tmp_path / NAME} is missing or damaged; it is made again"]
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_killed_writer_are_removed_on_request_and_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    left = tmp_path / ".rows.safetensors.77.tmp"
    left.write_bytes(b"half")
    folder = ResumeFolder(tmp_path, "key")
    assert left.exists()  # another process may be writing it
    folder.remove_temporary()
    folder.remove_others()
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []
