"""Every sort of damage to a training's resume states: it goes on from a sound one, bit for bit, or begins anew.

There are two states, after 3 and after 4 steps. After a damage the state that is taken is the very one that was saved
under that name, and what was not taken is logged.
"""

import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmfusion.artifacts.resume import ResumeFolder, note_path, write_note
from llmfusion.io.files import sha256_file
from llmfusion.training import resume_state
from tests.damages import DEEP, OF_A_FILE, Damage
from tests.unit.training.test_resume_state import equal, trained

KEY = "key"
OLDER, NEWER = "step-00000003.safetensors", "step-00000004.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch, caplog):
    """Two states; nothing here may wait for ever."""
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "state", KEY, 3, 4)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for ever"))
    signal.alarm(20)
    yield folder
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def saved(place, key, *steps, seed=0):
    folder = ResumeFolder(place, key)
    for step in steps:
        resume_state.save(folder, step, *trained(step, seed), {"records": [{"step": step}]})
    return folder


def restored(folder):
    """The step that was gone on from, after comparing all that was restored with the training itself; 0 for none."""
    model, optimizer = trained(0, seed=9)
    untouched = [parameter.clone() for parameter in model.parameters()]
    state = resume_state.restore(ResumeFolder(folder.folder, KEY), model, optimizer)
    if state is None:
        assert all(torch.equal(a, b) for a, b in zip(untouched, model.parameters(), strict=True))
        return 0
    step, progress = state
    assert progress == {"records": [{"step": step}]}
    expected, moments = trained(step)
    assert equal(expected, model)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[own].get(name), moments.state[other].get(name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return step


OF_NEWER = {(of, name): damage for of in ("state", "note") for name, damage in OF_A_FILE.items()}
HARMLESS = {  # whoever may go on may have written it; and what changes nothing of what a note says
    ("state", "a hard link to a file of another user"),
    ("note", "a hard link to a file of another user"),
    ("note", "one byte more"),
    ("note", "a byte order mark"),
}


@pytest.mark.parametrize("case", OF_NEWER, ids=" of the ".join)
def test_a_damaged_state_or_note_gives_way_to_the_state_before(folder, case, caplog):
    path = folder.folder / NEWER
    OF_NEWER[case](path if case[0] == "state" else note_path(path))
    step = restored(folder)
    if step == 4:
        assert case in HARMLESS
        return
    assert step == 3
    assert [message for message in caplog.messages if NEWER in message]
    assert sorted(p.name for p in folder.folder.iterdir()) == ["step-00000003.json", OLDER]


@pytest.mark.parametrize("case", [case for case in OF_NEWER if case not in HARMLESS], ids=" of the ".join)
def test_two_damaged_states_or_notes_are_a_beginning(folder, case):
    for name in (OLDER, NEWER):
        path = folder.folder / name
        OF_NEWER[case](path if case[0] == "state" else note_path(path))
        (folder.folder.parent / f"outside-{path.name}").unlink(missing_ok=True)
    assert restored(folder) == 0
    assert list(folder.folder.iterdir()) == []


def note_honestly(path, key=KEY):
    """A note over whatever the file holds now, as a careful hand would write it."""
    note_path(path).unlink(missing_ok=True)
    write_note(path, {"key": key, "sha256": sha256_file(path)})


def with_header(path, **changed):
    """The same tensors under another header, honestly noted."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata={**header, **changed})
    note_honestly(path)


def copied(name, source=OLDER, honest=False) -> Damage:
    """A state under another step's name, with its own note or an honest one."""

    def damage(place: Path) -> None:
        shutil.copyfile(place / source, place / name)
        shutil.copyfile(note_path(place / source), note_path(place / name))
        if honest:
            note_honestly(place / name)

    return damage


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _swap_all(place: Path) -> None:
    swap(place / OLDER, place / NEWER)
    swap(note_path(place / OLDER), note_path(place / NEWER))


def _swap_honestly(place: Path) -> None:
    swap(place / OLDER, place / NEWER)
    for name in (OLDER, NEWER):
        note_honestly(place / name)


def _of_another_training(place: Path) -> None:
    saved(place.with_name("other"), "other", 4, seed=5)
    for name in (NEWER, note_path(Path(NEWER)).name):
        shutil.copyfile(place.with_name("other") / name, place / name)


def _of_another_training_honestly(place: Path) -> None:
    saved(place.with_name("other"), "other", 4, seed=5)
    shutil.copyfile(place.with_name("other") / NEWER, place / NEWER)
    note_honestly(place / NEWER)


def _of_a_later_branch(place: Path) -> None:
    """A state of the same training, from a machine where the one before it was another."""
    other = ResumeFolder(place.with_name("other"), KEY)
    resume_state.save(other, 3, *trained(2), {"records": []})
    resume_state.save(other, 4, *trained(4, seed=5), {"records": [{"step": 4}]})
    for name in (NEWER, note_path(Path(NEWER)).name):
        shutil.copyfile(other.folder / name, place / name)


def _of_a_larger_model(place: Path) -> None:
    tensors = {
        name: torch.zeros(7, 7) if name == "model.0.weight" else t for name, t in load_file(place / NEWER).items()
    }
    with safe_open(place / NEWER, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, place / NEWER, metadata=header)
    note_honestly(place / NEWER)


def _without(*names: str) -> Damage:
    def damage(place: Path) -> None:
        with safe_open(place / NEWER, framework="pt") as file:
            header = file.metadata()
        tensors = {name: t for name, t in load_file(place / NEWER).items() if name not in names}
        save_file(tensors, place / NEWER, metadata=header)
        note_honestly(place / NEWER)

    return damage


def write(name: str, content: bytes = b"x") -> Damage:
    return lambda place: (place / name).write_bytes(content)


MISPLACED: dict[str, tuple[Damage, int]] = {  # with the step that is gone on from
    "an older state under a later name": (copied("step-00000044.safetensors"), 4),
    "an older state under a later name, honestly noted": (copied("step-00000044.safetensors", honest=True), 4),
    "the newer state under a later name": (copied("step-00000044.safetensors", NEWER), 4),
    "the newer state under a later name, honestly noted": (copied("step-00000044.safetensors", NEWER, True), 4),
    "the older state copied over the newer": (copied(NEWER), 3),
    "the older state copied over the newer, honestly noted": (copied(NEWER, honest=True), 3),
    "the newer state copied over the older": (copied(OLDER, NEWER), 4),
    "both swapped": (_swap_all, 0),
    "both swapped, honestly noted": (_swap_honestly, 0),
    "files swapped": (lambda place: swap(place / OLDER, place / NEWER), 0),
    "notes swapped": (lambda place: swap(note_path(place / OLDER), note_path(place / NEWER)), 0),
    "a state of another training": (_of_another_training, 3),
    "a state of another training, honestly noted": (_of_another_training_honestly, 3),
    "another key in the header, honestly noted": (lambda place: with_header(place / NEWER, key="other"), 3),
    "no progress in the header, honestly noted": (lambda place: with_header(place / NEWER, progress=""), 3),
    "deep progress in the header": (lambda place: with_header(place / NEWER, progress=DEEP.decode()), 3),
    "progress that is a list": (lambda place: with_header(place / NEWER, progress="[]"), 3),
    "a state that follows another one": (_of_a_later_branch, 3),
    "a state of a larger model": (_of_a_larger_model, 3),
    "a state without a weight": (_without("model.0.weight"), 3),
    "a state without the random state": (_without("rng"), 3),
    "the older state gone": (lambda place: (place / OLDER).unlink(), 4),
    "the older note gone": (lambda place: note_path(place / OLDER).unlink(), 4),
    "garbage under a later name": (write("step-99999999.safetensors"), 4),
    "a folder under a later name": (lambda place: (place / "step-99999999.safetensors").mkdir(), 4),
    "a FIFO under a later name": (lambda place: os.mkfifo(place / "step-99999999.safetensors"), 4),
    "a name that is no step": (write("step-abc.safetensors"), 4),
    "an empty state without a note": (write("step-00000005.safetensors", b""), 4),
    "a note without a state": (write("step-00000005.json", b"{}"), 4),
    "a temporary folder": (lambda place: (place / ".step-00000005.safetensors.77.tmp").mkdir(), 4),
    "something of another name": (write("notes.txt"), 4),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_a_state_in_the_wrong_place_is_not_believed(folder: ResumeFolder, case: str) -> None:
    damage, expected = MISPLACED[case]
    damage(folder.folder)
    assert restored(folder) == expected


def test_there_are_more_than_forty_damages() -> None:
    assert len(OF_NEWER) + len(MISPLACED) > 40


def test_a_chain_of_saves_and_restarts_stays_sound(folder: ResumeFolder) -> None:
    """Each state names the one before it, also the first one after a restart from an older state."""
    (folder.folder / NEWER).unlink()
    assert restored(folder) == 3
    again = saved(folder.folder, KEY, 4, 5)
    assert restored(again) == 5
    with safe_open(folder.folder / "step-00000005.safetensors", framework="pt") as file:
        previous = file.metadata()["previous"]
    assert previous == sha256_file(folder.folder / NEWER)
