"""Every sort of damage to what a killed capture left: the cache that comes out is the same, byte for byte."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from llmfusion.artifacts.resume import ResumeFolder, note_path, write_note
from llmfusion.io.files import sha256_file
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, HEAD_FILE, chunk_file_name
from llmfusion.teachers.capture import assemble_cache, capture_chunks
from llmfusion.teachers.chunks import Shard
from tests.damages import OF_A_FILE, Damage

ONE, TWO = chunk_file_name(1), chunk_file_name(2)
OPTIONS = Capture(dtype="float32", batch_size=7)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 8)  # 29 samples: 4 chunks
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for ever"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, mix):
    """All chunks of a capture, and the files of its cache."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_SAMPLES, "hidden", 8)
        capture_chunks(teacher, mix, OPTIONS, None, ResumeFolder(place / "work", "key"), Shard())
        (place / "cache").mkdir()
        facts = assemble_cache(teacher, mix, [place / "work"], place / "cache", OPTIONS, None)
    return place / "work", contents(place / "cache"), facts


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")}


def swap(place: Path, one: str, other: str) -> None:
    content = (place / one).read_bytes()
    (place / one).write_bytes((place / other).read_bytes())
    (place / other).write_bytes(content)


def _swap_all(place: Path) -> None:
    swap(place, ONE, TWO)
    swap(place, note_path(Path(ONE)).name, note_path(Path(TWO)).name)


def _copy_over(place: Path) -> None:
    shutil.copyfile(place / ONE, place / TWO)
    shutil.copyfile(note_path(place / ONE), note_path(place / TWO))


def _edit_note(place: Path) -> None:
    note = json.loads(note_path(place / ONE).read_text())
    note["gap"] = 0.5
    note_path(place / ONE).write_text(json.dumps(note))


def _of_another_key(place: Path) -> None:
    note_path(place / ONE).unlink()
    write_note(place / ONE, {"key": "other", "sha256": sha256_file(place / ONE), "index": []})


MOVED: dict[str, Damage] = {
    "chunks swapped with their notes": _swap_all,
    "chunks swapped": lambda place: swap(place, ONE, TWO),
    "notes swapped": lambda place: swap(place, note_path(Path(ONE)).name, note_path(Path(TWO)).name),
    "a chunk copied over another": _copy_over,
    "a chunk under a number that there is not": lambda place: (
        (place / ONE).rename(place / chunk_file_name(77)),
        note_path(place / ONE).rename(note_path(place / chunk_file_name(77))),
    ),
    "an edited note": _edit_note,
    "a chunk of another key": _of_another_key,
    "a file of the same stem": lambda place: (place / "piece-00001.bin").write_text("x"),
    "a chunk without a note": lambda place: note_path(place / ONE).unlink(),
    "a folder more": lambda place: (place / "more" / "deep").mkdir(parents=True),
    "a FIFO more": lambda place: os.mkfifo(place / "piece-00009.json"),
    "a link more": lambda place: (place / "piece-00009.safetensors").symlink_to("/etc/hostname"),
    "a temporary folder": lambda place: (place / ".piece-00001.safetensors.7.tmp").mkdir(),
    "the head over a chunk": lambda place: shutil.copyfile(place / HEAD_FILE, place / ONE),
}
CASES: dict[str, Damage] = {
    **{f"a chunk: {name}": (lambda place, d=damage: d(place / ONE)) for name, damage in OF_A_FILE.items()},
    **{f"a note: {name}": (lambda place, d=damage: d(note_path(place / ONE))) for name, damage in OF_A_FILE.items()},
    **{f"the head: {name}": (lambda place, d=OF_A_FILE[name]: d(place / HEAD_FILE)) for name in ("half", "a FIFO")},
    **MOVED,
}


@pytest.mark.parametrize("name", CASES)
def test_a_capture_goes_on_from_damaged_chunks_to_the_same_cache(finished, teacher, mix, tmp_path, name) -> None:
    left, expected, facts = finished
    place = shutil.copytree(left, tmp_path / "work")
    CASES[name](place)
    capture_chunks(teacher, mix, OPTIONS, None, ResumeFolder(place, "key"), Shard())
    (tmp_path / "cache").mkdir()
    assert assemble_cache(teacher, mix, [place], tmp_path / "cache", OPTIONS, None) == facts
    assert contents(tmp_path / "cache") == expected
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_symlink()]


def test_there_are_more_than_forty_damages() -> None:
    assert len(CASES) > 40
