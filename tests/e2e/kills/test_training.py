"""A training killed at any moment ends with the bytes of an undisturbed one; one save interval at most is repeated."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.kills.child import (
    FILE_EVENTS,
    MODEL,
    STATE,
    STATE_DAMAGED,
    STATE_FILE,
    STATE_SUFFIXES,
    Undisturbed,
    copied,
    files_of,
    kill_and_go_on,
    left_over,
    train,
)

Start = Callable[[str], Path]


def test_a_kill_before_each_thing_a_training_does_to_a_file(start: Start, whole: Undisturbed) -> None:
    assert {event.split()[0] for event in whole.events} == {"open", "write", "half", "fsync", *FILE_EVENTS}
    # after these, a kill finds what the one before it found
    same = [n + 1 for n, event in enumerate(whole.events, 1) if event.startswith(("fsync", "os.chmod"))]
    numbers = [n for n in range(1, len(whole.events) + 1) if n not in same]
    assert len(numbers) > 50
    for number in numbers:
        place = start(f"killed-{number}")
        killed, again = kill_and_go_on(train, place, number, MODEL, whole.model)
        assert left_over(place, MODEL) == [], number
        assert len(killed.steps) - again.steps[0] <= 1 if again.steps else "adopted" in again.output, number
    assert train(start("survives"), kill_at=len(whole.events) + 1).status == 0


def test_kills_again_and_again_leave_no_more_than_one_half_written_state(start: Start, whole: Undisturbed) -> None:
    from llmfusion.training import resume_state

    def ends_halfway() -> None:
        def half(tensors: Any, path: Path, note: Any) -> str:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
            return ""

        resume_state.write_tensors = half

    place = start("again")
    for _ in range(3):
        assert train(place, prepare=ends_halfway).status == -signal.SIGKILL
        [left] = (place / STATE).iterdir()
        assert left.name.endswith(".tmp")
    assert train(place).status == 0
    assert files_of(place, MODEL) == whole.model


def _zero_tail(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size * 3 // 4)
    os.truncate(path, size)


TEARS: dict[str, Callable[[Path], object]] = {  # what a crash of the machine can make of a file
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zero tail": _zero_tail,
    "garbage": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
}


def tear_newest(place: Path, tear: Callable[[Path], object]) -> None:
    """What was written last to the resume state is torn."""
    tear(max((place / STATE).iterdir(), key=lambda p: p.stat().st_mtime_ns))


def test_a_crash_of_the_machine_within_a_save_costs_two_intervals_at_most(start: Start, whole: Undisturbed) -> None:
    moments = range(whole.first("write", STATE_FILE) + 1, whole.first("metrics") + 1)
    assert len(moments) > 8
    for number in moments:
        place = start(f"torn-{number}")
        tear = list(TEARS.values())[number % len(TEARS)]
        killed, again = kill_and_go_on(
            train, place, number, MODEL, whole.model, between=partial(tear_newest, place, tear)
        )
        assert len(killed.steps) - again.steps[0] <= 2, number


@pytest.mark.parametrize("suffix", STATE_SUFFIXES)
@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_state_gives_way_to_the_one_before(start: Start, whole: Undisturbed, tear: str, suffix: str) -> None:
    place = start(f"last-{suffix}-{tear}")
    train(place, kill_at=whole.first("metrics"))
    TEARS[tear](place / STATE / f"{STATE_FILE}.{suffix}")
    again = train(place)
    assert again.steps == [2, 3], again.output
    assert STATE_DAMAGED in again.output
    assert files_of(place, MODEL) == whole.model
    assert left_over(place, MODEL) == []


def test_a_kill_while_an_old_model_is_replaced_shows_the_old_the_new_or_none(start: Start, whole: Undisturbed) -> None:
    old = start("old")
    assert train(old, seed=4).status == 0
    before = files_of(old, MODEL)
    assert before != whole.model
    done = train(copied(old, "replaced"))
    swap = done.first("os.rename results/models/base/p")
    seen = []
    for number in (swap - 1, swap, swap + 1, swap + 2, swap + 3, *range(swap + 4, len(done.events) + 1, 4)):
        place = copied(old, f"replaced-{number}")
        look = partial(lambda place: seen.append(files_of(place, MODEL)), place)
        kill_and_go_on(train, place, number, MODEL, whole.model, before, look)
        assert left_over(place, MODEL) == [], number
    assert [content in seen for content in (before, {}, whole.model)] == [True, True, True]


def _forget_random_state() -> None:
    torch.set_rng_state = lambda state: None


def _forget_moments() -> None:
    from llmfusion.training import resume_state

    load = resume_state._load

    def without_moments(path: Path, model: Any, optimizer: Any) -> Any:
        notes = load(path, model, optimizer)
        optimizer.state.clear()
        return notes

    resume_state._load = without_moments


@pytest.mark.parametrize("forget", [_forget_random_state, _forget_moments])
def test_a_state_that_is_not_restored_in_full_is_noticed(
    start: Start, whole: Undisturbed, forget: Callable[[], None]
) -> None:
    """The comparison of these tests can fail: without the random state, or without moments, another model comes out."""
    place = start(f"without{forget.__name__}")
    train(place, kill_at=whole.first("metrics"))
    assert train(place, prepare=forget).steps == [3]
    files = files_of(place, MODEL)
    assert {name for name in files if files[name] != whole.model[name]} >= {"manifest.json", "model.safetensors"}


def test_a_job_ends_within_its_minutes_and_goes_on_bit_for_bit(start: Start, whole: Undisturbed) -> None:
    place = start("minutes")
    for done in (1, 2, 3):
        ended = train(place, prepare=_a_clock_five_times_as_fast, words=("--minutes", "0.75"))
        assert ended.status == 143, ended.output
        assert f"stopped after step {done} of 4; the state is saved" in ended.output
        assert float(re.findall(r"(\S+) s of 45 s", ended.output)[-1]) < 45
        assert files_of(place, MODEL) == {}
    assert train(place, prepare=_a_clock_five_times_as_fast, words=("--minutes", "0.75")).status == 0
    assert files_of(place, MODEL) == whole.model


def _a_clock_five_times_as_fast() -> None:
    """A step takes 16 seconds of it."""
    from llmfusion.artifacts import job
    from llmfusion.training import loop, save_deadline

    began = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: 5 * time.monotonic(), time=time.time)
    for module in (loop, save_deadline, job):
        module.time = clock  # type: ignore[attr-defined]
    loop.SAVE_SECONDS = 900.0
    one = loop._Loop._step

    def slow(self: Any, number: int, samples: list[int]) -> None:
        one(self, number, samples)
        time.sleep(3.2)

    def leave(status: Any = None) -> None:
        print(f"{5 * (time.monotonic() - began):.1f} s of 45 s")
        sys.exit(status)

    loop._Loop._step = slow
    loop.sys = SimpleNamespace(exit=leave)


def _spoil_step_two() -> None:
    from llmfusion.training.loop import _Loop

    one = _Loop._step

    def spoilt(self: Any, number: int, samples: list[int]) -> None:
        if number == 2:
            self.model.model.norm.weight.data.fill_(float("nan"))
        one(self, number, samples)

    _Loop._step = spoilt  # type: ignore[method-assign]


def test_a_loss_that_is_not_a_number_costs_nothing_that_was_saved(start: Start, whole: Undisturbed) -> None:
    place = start("nan")
    ended = train(place, prepare=_spoil_step_two)
    assert (ended.status, ended.steps) == (1, [0, 1])
    message = r"^error: step 3 of 4: loss or gradient is nan at learning rate [\d.e-]+; samples q\d+(, q\d+){3}\. "
    assert re.search(rf"{message}Nothing was published$", ended.output, re.MULTILINE)
    assert files_of(place, MODEL) == {}
    again = train(place)
    assert (again.status, again.steps) == (0, [2, 3]), again.output
    assert files_of(place, MODEL) == whole.model


@pytest.mark.parametrize(
    ("kill_with", "first", "every", "statuses"),
    [(signal.SIGTERM, 1, 8, {0, 143}), (signal.SIGINT, 5, 12, {0, 130, 143})],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_before_any_eighth_or_twelfth_thing_done_to_a_file(
    start: Start, whole: Undisturbed, kill_with: int, first: int, every: int, statuses: set[int]
) -> None:
    seen = set()
    for number in range(first, len(whole.events) + 1, every):
        place = start(f"ended-{kill_with}-{number}")
        ended = train(place, kill_at=number, kill_with=kill_with)
        where = f"signal {kill_with} at {number}: {whole.events[number - 1]}, then {ended.status}"
        seen.add(ended.status)
        assert ended.status in statuses, (where, ended.output)
        assert "Traceback" not in ended.output, where
        assert files_of(place, MODEL) == (whole.model if ended.status == 0 else {}), where
        again = train(place)
        assert again.status == 0, (where, again.output)
        assert files_of(place, MODEL) == whole.model, where
        assert left_over(place, MODEL) == [], where
        if ended.status != 0:  # what was finished is made again: the second run is asked for it anew
            assert len(ended.steps) == (again.steps or [len(ended.steps)])[0], f"{where}: a step was lost"
    assert seen == statuses
