"""What a killed merge left, damaged in every way: only what was finished is believed, and the merge is the same."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from llmfusion.merging import engine
from llmfusion.merging.journal import Journal
from tests.damages import OF_A_FILE, Damage
from tests.unit.merging.test_engine import folder_of, plan_of

TENSORS = [f"w{number}" for number in range(6)]
ENTRIES = {
    name: {"xxh3": f"{number:016x}", "row": {"tensor": name, "share": number / 7}}
    for number, name in enumerate(TENSORS)
}
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _nothing_waits_for_ever(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for ever"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "journal.jsonl", "key")


def written(path, key, entries=ENTRIES):
    journal = Journal(path, key)
    journal.start({})
    for name, entry in entries.items():
        journal.add(name, entry)
    return path


def lines(path, change):
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(content)))


def swapped_rows(content):
    """Two tensors' rows change places."""
    entries = [json.loads(line) for line in content]
    entries[2]["done"], entries[3]["done"] = entries[3]["done"], entries[2]["done"]
    return [json.dumps(entry).encode() + b"\n" for entry in entries]


def of_another_merge(path):
    other = written(path.with_name("other"), "other", {name: {"xxh3": "f" * 16, "row": None} for name in TENSORS})
    lines(path, lambda own: [*own[:2], *other.read_bytes().splitlines(keepends=True)[2:]])


MOVED: dict[str, Damage] = {
    "two lines swapped": lambda path: lines(path, lambda c: [*c[:2], c[3], c[2], *c[4:]]),
    "a line twice": lambda path: lines(path, lambda c: [*c[:3], c[2], *c[3:]]),
    "a line gone": lambda path: lines(path, lambda c: [*c[:2], *c[3:]]),
    "the first line gone": lambda path: lines(path, lambda c: c[1:]),
    "rows swapped": lambda path: lines(path, swapped_rows),
    "a number of a row changed": lambda path: lines(path, lambda c: [line.replace(b"0.14", b"0.15") for line in c]),
    "a tensor renamed": lambda path: lines(path, lambda c: [line.replace(b'"w3"', b'"w5"') for line in c]),
    "a line without its checksum": lambda path: lines(
        path, lambda c: [*c[:3], c[3].split(b', "checksum"')[0] + b"}\n"]
    ),
    "a deep line": lambda path: lines(path, lambda c: [*c[:3], b"[" * 100_000 + b"\n", *c[3:]]),
    "a line that is a list": lambda path: lines(path, lambda c: [*c[:3], b"[1]\n", *c[3:]]),
    "half a line": lambda path: lines(path, lambda c: [*c[:-1], c[-1][:20]]),
    "NaN": lambda path: lines(path, lambda c: [line.replace(b'"share": 0.0', b'"share": NaN') for line in c]),
    "lines of another merge": of_another_merge,
    "another key": lambda path: lines(path, lambda c: [c[0].replace(b'"key": "key"', b'"key": "kez"'), *c[1:]]),
}
OF_A_JOURNAL = {**OF_A_FILE, **MOVED}


@pytest.mark.parametrize("name", OF_A_JOURNAL)
def test_of_a_damaged_journal_only_what_was_written_is_believed(path: Path, name: str) -> None:
    OF_A_JOURNAL[name](path)
    found = Journal(path, "key").read()
    assert list(found) == TENSORS[: len(found)]  # from the beginning, without a gap
    assert found == {tensor: ENTRIES[tensor] for tensor in found}


def test_an_undamaged_journal_is_believed_as_a_whole(path: Path) -> None:
    assert Journal(path, "key").read() == ENTRIES
    assert Journal(path, "other").read() == {}


def test_a_journal_goes_on_where_it_was_begun_anew(path: Path) -> None:
    journal = Journal(path, "key")
    kept = dict(list(journal.read().items())[:3])
    journal.start(kept)
    journal.add("w9", {"xxh3": "9" * 16, "row": {"share": float("inf")}})
    assert list(Journal(path, "key").read()) == [*TENSORS[:3], "w9"]


# ------------------------------------------------------------------------------------------------ the whole folder
@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """A plan, the folder of the undisturbed merge, and one that was killed before its last tensor."""
    place = tmp_path_factory.mktemp("merge")
    generator = torch.Generator().manual_seed(0)
    folders = [
        folder_of(place / str(i), {name: torch.randn(40 + 7 * i, generator=generator)[:40] for name in TENSORS})
        for i in range(3)
    ]
    plan = plan_of(folders[0], folders[1:], "rsaf")
    engine.run(plan, place / "whole", "key", 1)
    add, left = Journal.add, [len(TENSORS) - 1]

    def dies(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            engine.run(plan, place / "killed", "key", 1)
    return plan, contents(place / "whole"), place / "killed"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OF_A_FOLDER: dict[str, Damage] = {
    **{f"the weights: {name}": (lambda place, d=damage: d(place / WEIGHTS)) for name, damage in OF_A_FILE.items()},
    **{f"the journal: {name}": (lambda place, d=d: d(place / engine.JOURNAL)) for name, d in OF_A_JOURNAL.items()},
    "a file more": lambda place: (place / "adapter_config.json").write_text("{}"),
    "a folder more": lambda place: (place / "more").mkdir(),
    "a FIFO more": lambda place: os.mkfifo(place / "more.jsonl"),
    "a link more": lambda place: (place / "chat_template.jinja").symlink_to("/etc/hostname"),
    "a linked folder more": lambda place: (place / "additional_chat_templates").symlink_to("/etc"),
}


@pytest.mark.parametrize("name", OF_A_FOLDER)
def test_a_merge_goes_on_from_a_damaged_folder_to_the_same_bytes(merge, tmp_path: Path, name: str) -> None:
    plan, whole, killed = merge
    out = shutil.copytree(killed, tmp_path / "out")
    OF_A_FOLDER[name](out)
    engine.run(plan, out, "key", 1)
    assert contents(out) == whole
    assert not [path for path in out.rglob("*") if path.is_symlink()]


def test_there_are_more_than_forty_damages() -> None:
    assert len(OF_A_FOLDER) > 40
