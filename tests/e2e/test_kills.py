"""Kills at any moment: in the end there is what an undisturbed run makes, and at most one save interval was made twice."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from llmfusion.artifacts import job as step
from llmfusion.artifacts import provenance
from llmfusion.artifacts.job import Job
from llmfusion.artifacts.store import Draft, draft_folder, manifest_of, publish, read
from llmfusion.errors import DamagedError
from llmfusion.steps import stage_base as base
from tests.e2e.conftest import TARGET, Project
from tests.e2e.test_faults import said, wait
from tests.e2e.test_runs import PROFILE, results
from tests.project import environment, snakemake
from tests.unit.stand_ins import ARCHITECTURE, question

MIX, OUT, STATE = "results/data/mix/m/manifest.json", "results/models/base/p/manifest.json", "work/models/base/p/state"
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod")
SPEC: dict[str, Any] = {
    "kind": "scratch", "mix": "m", "steps": 4, "batch_size": 4, "lr": 1e-2, "seed": 3, "save_dtype": "float32", "tokenizer": {"vocabulary_size": 300},
    "architecture": {**ARCHITECTURE, "num_hidden_layers": 1, "attention_dropout": 0.1},  # dropout: going on needs the random state, too
}  # fmt: skip


# One job, killed before each thing it does to a file. It runs in a forked child, so that nothing is imported twice.


@dataclass
class Ended:
    """A child that has ended: its exit status, what it did to files, the steps it trained, what it printed."""

    status: int
    did: list[str]
    steps: list[int]
    said: str


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives fresh folders with a mix in them; loads, and uses once, what the children need."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import write_jsonl
    from llmfusion.models.loading import save_model
    from llmfusion.models.scratch import make_model, make_tokenizer

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("boundaries")
    output = root / "mix" / MIX
    draft = Draft("data/mix/m", "{}", {}, draft_folder(output, "token"), {"max_length": 128, "samples": 16})
    draft.folder.mkdir(parents=True)
    samples = [question(f"q{i}", f"What is {i} plus {2 * i}?", f"{3 * i}" + " is it" * (i % 5)) for i in range(16)]
    write_jsonl(draft.folder / "samples.jsonl", samples)
    tokenizer = make_tokenizer(SPEC["tokenizer"], draft.folder / "samples.jsonl", None)
    model = make_model(SPEC["architecture"], tokenizer, 1)
    with torch.no_grad():
        model(torch.tensor([encode(samples[0], tokenizer, 128).ids]))  # type: ignore[union-attr]
    save_model(model, tokenizer, root / "warm", "float32")
    publish(draft, output, {})

    def fresh(name: str) -> Path:
        return shutil.copytree(root / "mix", root / name)

    return fresh


@dataclass
class Whole:
    """The model trained without any disturbance: its files, and what was done to files on the way."""

    model: dict[str, bytes]
    did: list[str]

    def first(self, *words: str) -> int:
        """Number of the first thing done to a file that these words describe."""
        return next(n for n, what in enumerate(self.did, 1) if all(word in what for word in words))


@pytest.fixture(scope="session")
def whole(start: Callable[[str], Path]) -> Whole:
    place = start("whole")
    ended = train(place)
    assert ended.status == 0, ended.said
    return Whole(model(place), ended.did)


def train(
    place: Path,
    kill_at: int = 0,
    prepare: Callable[[], None] = lambda: None,
    words: tuple[str, ...] = (),
    kill_with: int = signal.SIGKILL,
    **changed: Any,
) -> Ended:
    """Make the model in ``place`` with a save after each step; the child ends itself before the ``kill_at``-th thing it does to a file."""

    def build(watch: Callable[[str], None]) -> int:
        from llmfusion.training import loop as training

        _watch_training(watch)
        training.SAVE_SECONDS = -1.0
        prepare()
        sys.argv = [
            "base",
            "--spec",
            json.dumps({"base": {**SPEC, **changed}}, sort_keys=True),
            "--out",
            OUT,
            "--inputs",
            MIX,
            *words,
        ]
        return step.run("base", base.build)

    return forked(place, build, kill_at, kill_with)


def forked(
    place: Path, build: Callable[[Callable[[str], None]], int], kill_at: int = 0, kill_with: int = signal.SIGKILL
) -> Ended:
    """Run ``build`` in a child in ``place``, counting what it does to files there."""
    notes, log = place.with_name(f"{place.name}.notes"), place.with_name(f"{place.name}.log")
    with open(notes, "wb") as noted, open(log, "w", buffering=1) as printed:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
                torch.set_num_threads(
                    1
                )  # renews torch's pool, which a fork leaves behind, before two threads of the child try to at once
                sys.stdout = sys.stderr = printed
                os.chdir(place)
                provenance.collect = lambda started: {}
                status = build(_watch(place, noted.fileno(), kill_at, kill_with))
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = notes.read_text().splitlines()
    steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    return Ended(status, [line for line in lines if not line.startswith("step ")], steps, log.read_text())


def _watch(place: Path, notes: int, kill_at: int, kill_with: int) -> Callable[[str], None]:
    """A function to be told of everything done to a file; Python's own file functions tell it by themselves."""
    count = 0

    def watch(what: str) -> None:
        nonlocal count
        if what.startswith("half") and count + 1 == kill_at and kill_with == signal.SIGKILL:
            path = what.removeprefix("half ")
            os.truncate(path, os.path.getsize(path) // 2)
        os.write(notes, f"{what}\n".encode())
        if not what.startswith("step "):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), kill_with)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(given[0], int) or not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in FILE_EVENTS:
            return
        path = os.fsdecode(given[0])
        if path.startswith(str(place)) or not os.path.isabs(path):
            if event == "os.mkdir" and os.path.isdir(path):
                return
            watch(f"{event} {path}")

    os.fsync = lambda handle: watch(
        f"fsync {os.readlink(f'/proc/self/fd/{handle}')}"
    )  # and no more: it is slow, and a kill loses nothing that was written
    sys.addaudithook(hook)
    return watch


def _watch_training(watch: Callable[[str], None]) -> None:
    """safetensors writes by itself; also a file half written is a moment to be killed at."""
    from transformers import modeling_utils

    from llmfusion.training import resume_state as checkpoint
    from llmfusion.training.loop import _Loop

    def watched(save: Callable[..., Any]) -> Callable[..., Any]:
        def save_file(tensors: Any, path: Any, *more: Any, **named: Any) -> Any:
            watch(f"write {path}")
            told = save(tensors, path, *more, **named)
            watch(f"half {path}")
            return told

        return save_file

    for module, name in ((checkpoint, "write_tensors"), (modeling_utils, "safe_save_file")):
        setattr(module, name, watched(getattr(module, name)))
    one = _Loop._step

    def noted(self: Any, number: int, samples: list[int]) -> None:
        one(self, number, samples)
        watch(f"step {number}")

    _Loop._step = noted  # type: ignore[method-assign]


def model(place: Path) -> dict[str, bytes]:
    """Weights, metrics, manifest and all else of the model in ``place``; empty if there is none."""
    folder = (place / OUT).parent
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"} if folder.exists() else {}


def left_over(place: Path) -> list[str]:
    """What a finished run leaves besides results: nothing but a waiting writer's private file, if it was killed while it wrote that."""
    visible = {"results/models/base/p", "results/data/mix/m"}
    results = {str(p.relative_to(place)) for p in place.glob("results/*/*/*")} - visible
    work = {
        str(p.relative_to(place))
        for p in place.rglob("work/**/*")
        if p.is_file() and not re.fullmatch(r"lease\.[0-9a-f]{32}", p.name)
    }
    return sorted(results | work)


CACHE = "results/teachers/base/p/m/manifest.json"


def capture_in(place: Path, kill_at: int = 0) -> Ended:
    """Capture the model in ``place`` over its mix of 16 samples, in four pieces."""

    def build(watch: Callable[[str], None]) -> int:
        import safetensors.torch

        from llmfusion.steps import capture_teacher as capture
        from llmfusion.teachers import cache_format as layout

        layout.CHUNK_SAMPLES["hidden"] = 4
        save = safetensors.torch.save_file

        def watched(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
            watch(f"write {path}")
            save(tensors, path, *more, **named)
            watch(f"half {path}")

        safetensors.torch.save_file = watched  # type: ignore[assignment]
        spec = {"capture": {"batch_size": 2}, "mix": "m", "model": "base/p", "step": "capture"}
        sys.argv = ["capture", "--spec", json.dumps(spec, sort_keys=True), "--out", CACHE, "--inputs", OUT, MIX]
        return step.run("capture", capture.build)

    return forked(place, build, kill_at)


def cached(place: Path) -> dict[str, bytes]:
    """All files of the cache in ``place``, manifest included; empty if there is none."""
    folder = (place / CACHE).parent
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"} if folder.exists() else {}


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_capture_that_is_killed_goes_on_to_the_same_bytes_and_loses_at_most_one_piece(
    start: Callable[[str], Path], every: int
) -> None:
    base_of = start(f"captured-{every}")
    assert train(base_of).status == 0
    place = shutil.copytree(base_of, base_of.with_name(f"whole-cache-{every}"))
    done = capture_in(place)
    assert done.status == 0, done.said
    expected = cached(place)
    assert sum(name.startswith("piece") for name in expected) == 4
    for number in range(1, len(done.did) + 1, every):
        place = shutil.copytree(base_of, base_of.with_name(f"capture-killed-{every}-{number}"))
        killed = capture_in(place, number)
        where = f"killed at {number}: {killed.did[-1]}"
        assert killed.status == -signal.SIGKILL, killed.said
        assert cached(place) in ({}, expected), where
        again = capture_in(place)
        assert again.status == 0, (where, again.said)
        assert cached(place) == expected, where
        assert [
            str(p) for p in (place / "work/teachers").rglob("*") if p.is_file() and not p.name.startswith("lease")
        ] == [], where
        assert [p.name for p in (place / "results/teachers/base/p").glob(".*")] == [], where
        read = killed.said.count("tokens/s") + again.said.count("tokens/s")
        assert read <= 5, where


def test_a_kill_before_each_thing_a_training_does_to_a_file(start: Callable[[str], Path], whole: Whole) -> None:
    assert {what.split()[0] for what in whole.did} == {"open", "write", "half", "fsync", *FILE_EVENTS}
    same = [
        n + 1 for n, what in enumerate(whole.did, 1) if what.startswith(("fsync", "os.chmod"))
    ]  # a kill finds what the one before it found
    numbers = [n for n in range(1, len(whole.did) + 1) if n not in same]
    assert len(numbers) > 50
    for number in numbers:
        place = start(f"killed-{number}")
        killed = train(place, kill_at=number)
        where = f"killed at {number}: {killed.did[-1]}"
        assert killed.status == -signal.SIGKILL, killed.said
        assert model(place) in ({}, whole.model), where
        again = train(place)
        assert again.status == 0, (where, again.said)
        assert model(place) == whole.model, where
        assert left_over(place) == [], where
        assert len(killed.steps) - again.steps[0] <= 1 if again.steps else "adopted" in again.said, where
    assert train(start("survives"), kill_at=len(whole.did) + 1).status == 0


def test_kills_again_and_again_leave_no_more_than_one_half_written_state(
    start: Callable[[str], Path], whole: Whole
) -> None:
    from llmfusion.training import resume_state as checkpoint

    def ends_halfway() -> None:
        def half(tensors: Any, path: Path, note: Any) -> str:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
            return ""

        checkpoint.write_tensors = half

    place = start("again")
    for _ in range(3):
        assert train(place, prepare=ends_halfway).status == -signal.SIGKILL
        [left] = (place / STATE).iterdir()
        assert left.name.endswith(".tmp")
    assert train(place).status == 0
    assert model(place) == whole.model


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero_tail(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size * 3 // 4)
    os.truncate(path, size)


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


TEARS = (_empty, _cut, _zero_tail, _garbage)  # what a crash of the machine can make of a file


def test_a_crash_of_the_machine_within_a_save_costs_two_intervals_at_most(
    start: Callable[[str], Path], whole: Whole
) -> None:
    moments = range(whole.first("write", "step-00000003") + 1, whole.first("metrics") + 1)
    assert len(moments) > 8
    for number in moments:
        place = start(f"torn-{number}")
        killed = train(place, kill_at=number)
        newest = max((place / STATE).iterdir(), key=lambda p: p.stat().st_mtime_ns)
        TEARS[number % len(TEARS)](newest)
        again = train(place)
        where = f"killed at {number}: {killed.did[-1]}, then {newest.name} torn"
        assert again.status == 0, (where, again.said)
        assert model(place) == whole.model, where
        assert len(killed.steps) - again.steps[0] <= 2, where


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_state_gives_way_to_the_one_before(
    start: Callable[[str], Path], whole: Whole, tear: Callable[[Path], None]
) -> None:
    for kind in ("safetensors", "sha256"):
        place = start(f"last-{kind}{tear.__name__}")
        train(place, kill_at=whole.first("metrics"))
        tear(place / STATE / f"step-00000003.{kind}")
        again = train(place)
        assert again.steps == [2, 3], again.said
        assert "is damaged or was not finished; taking the one before" in again.said
        assert model(place) == whole.model
        assert left_over(place) == []


def test_a_kill_while_an_old_model_is_replaced_shows_the_old_the_new_or_none(
    start: Callable[[str], Path], whole: Whole
) -> None:
    old = start("old")
    assert train(old, seed=4).status == 0
    before = model(old)
    assert before != whole.model
    did, seen = train(shutil.copytree(old, old.with_name("replaced"))).did, []
    swap = next(n for n, what in enumerate(did, 1) if what.startswith("os.rename results/models/base/p"))
    for number in (swap - 1, swap, swap + 1, swap + 2, swap + 3, *range(swap + 4, len(did) + 1, 4)):
        place = shutil.copytree(old, old.with_name(f"replaced-{number}"))
        assert train(place, kill_at=number).status == -signal.SIGKILL
        seen.append(model(place))
        again = train(place)
        assert again.status == 0, again.said
        assert model(place) == whole.model
        assert left_over(place) == []
    assert all(found in (before, {}, whole.model) for found in seen)
    assert [found in seen for found in (before, {}, whole.model)] == [True, True, True]


def table(place: Path, text: str, kill_at: int = 0) -> Ended:
    """Make a table of two files, as :mod:`llmfusion.steps.table` does."""

    def fill(job: Job) -> None:
        for kind in ("csv", "md"):
            (job.folder / f"table2.{kind}").write_text(f"{kind}: {job.spec['text']}")

    def build(watch: Callable[[str], None]) -> int:
        sys.argv = ["table", "--spec", json.dumps({"text": text}), "--out", "results/table2.csv"]
        return step.run("table", fill)

    return forked(place, build, kill_at)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_kill_while_a_table_is_published_shows_no_mixture(tmp_path: Path, there: bool) -> None:
    number, whole = 0, tmp_path / "whole"
    whole.mkdir()
    table(whole, "new")
    while True:
        number += 1
        place = tmp_path / f"table-{number}"
        place.mkdir()
        if there:
            assert table(place, "old").status == 0
        killed = table(place, "new", kill_at=number)
        if killed.status == 0:
            break
        try:
            found = read(manifest_of(place / "results/table2.csv"), memory=None).spec["text"]
            assert {(place / f"results/table2.{kind}").read_text() for kind in ("csv", "md")} == {
                f"csv: {found}",
                f"md: {found}",
            }
        except DamagedError:
            found = "refused"
        assert found in ("new", "refused", "old" if there else ""), killed.did[-1]
        assert table(place, "new").status == 0
        assert {p.name: p.read_bytes() for p in (place / "results").iterdir()} == {
            p.name: p.read_bytes() for p in (whole / "results").iterdir()
        }
    assert number > 20


@pytest.mark.parametrize("forgotten", ["set_rng_state", "_load"])
def test_a_state_that_is_not_restored_in_full_is_noticed(
    start: Callable[[str], Path], whole: Whole, forgotten: str
) -> None:
    """The comparison of these tests can fail: without the random state, or without moments, another model comes out."""
    from llmfusion.training import resume_state as checkpoint

    def forget() -> None:
        if forgotten == "set_rng_state":
            torch.set_rng_state = lambda state: None
        else:
            load = checkpoint._load

            def without_moments(path: Path, model: Any, optimizer: Any) -> Any:
                notes = load(path, model, optimizer)
                optimizer.state.clear()
                return notes

            checkpoint._load = without_moments

    place = start(f"without{forgotten}")
    train(place, kill_at=whole.first("metrics"))
    assert train(place, prepare=forget).steps == [3]
    found = model(place)
    assert {name for name in found if found[name] != whole.model[name]} >= {"manifest.json", "model.safetensors"}


def test_a_job_ends_within_its_minutes_and_goes_on_bit_for_bit(start: Callable[[str], Path], whole: Whole) -> None:
    place = start("minutes")
    for done in (1, 2, 3):
        ended = train(place, prepare=_a_clock_five_times_as_fast, words=("--minutes", "0.75"))
        assert ended.status == 143, ended.said
        assert f"stopped after step {done} of 4; the state is saved" in ended.said
        assert float(re.findall(r"(\S+) s of 45 s", ended.said)[-1]) < 45
        assert model(place) == {}
    assert train(place, prepare=_a_clock_five_times_as_fast, words=("--minutes", "0.75")).status == 0
    assert model(place) == whole.model


def _a_clock_five_times_as_fast() -> None:
    """A step takes 16 seconds of it."""
    from llmfusion.training import loop as training
    from llmfusion.training import save_deadline as reserve

    began = time.monotonic()
    training.time = reserve.time = step.time = SimpleNamespace(monotonic=lambda: 5 * time.monotonic(), time=time.time)  # type: ignore[assignment]
    training.SAVE_SECONDS = 900.0
    one, leave = training._Loop._step, sys.exit

    def slow(self: Any, number: int, samples: list[int]) -> None:
        one(self, number, samples)
        time.sleep(3.2)

    def tell(status: Any = None) -> None:
        print(f"{5 * (time.monotonic() - began):.1f} s of 45 s")
        leave(status)

    training._Loop._step = slow
    training.sys = SimpleNamespace(exit=tell)


def test_a_loss_that_is_not_a_number_costs_nothing_that_was_saved(start: Callable[[str], Path], whole: Whole) -> None:
    def spoil() -> None:
        from llmfusion.training.loop import _Loop

        one = _Loop._step

        def spoilt(self: Any, number: int, samples: list[int]) -> None:
            if number == 2:
                self.model.model.norm.weight.data.fill_(float("nan"))
            one(self, number, samples)

        _Loop._step = spoilt  # type: ignore[method-assign]

    place = start("nan")
    ended = train(place, prepare=spoil)
    assert (ended.status, ended.steps) == (1, [0, 1])
    assert re.search(
        r"^error: step 3 of 4: loss or gradient is nan at learning rate [\d.e-]+; samples q\d+(, q\d+){3}\. Nothing was published$",
        ended.said,
        re.MULTILINE,
    )
    assert model(place) == {}
    again = train(place)
    assert (again.status, again.steps) == (0, [2, 3]), again.said
    assert model(place) == whole.model


def test_sigterm_before_any_eighth_thing_done_to_a_file(start: Callable[[str], Path], whole: Whole) -> None:
    seen = set()
    for number in range(1, len(whole.did) + 1, 8):
        place = start(f"ended-{number}")
        ended = train(place, kill_at=number, kill_with=signal.SIGTERM)
        where = f"SIGTERM at {number}: {whole.did[number - 1]}, then {ended.status}"
        seen.add(ended.status)
        assert ended.status in (0, 143), (where, ended.said)
        assert model(place) == (whole.model if ended.status == 0 else {}), where
        again = train(place)
        assert again.status == 0, (where, again.said)
        assert model(place) == whole.model, where
        assert left_over(place) == [], where
        assert len(ended.steps) == (again.steps or [len(ended.steps)])[0], f"{where}: a step was lost"
    assert seen == {0, 143}


# The whole workflow, killed at random moments: Snakemake itself, and its jobs.


class Ordeal:
    """Runs the tiny study in ``folder``, kills what it started itself and nothing else, and starts again as a user would."""

    def __init__(self, folder: Path, made: Path, seed: int):
        self.folder, self.made, self.random = folder, made, Random(seed)
        self.names = [name for name in results(made) if not name.endswith((".csv", ".md"))]
        self.missing = len(self.names) - self.done()
        self.began = time.monotonic()
        self.jobs: dict[int, psutil.Process] = {}  # of all Snakemakes started here: what has been killed leaves orphans
        self.protocol: list[str] = []
        self.hits = {"main": 0, "job": 0}

    def done(self) -> int:
        return sum((self.folder / "runs/tiny/results" / name).exists() for name in self.names)

    def run(self, kills: list[str]) -> None:
        """Run until the table is there. The kills (main or job) are spread over what there is to make; those for which the run was too short stay in the list."""
        every, first, moment = self.missing / max(len(kills), 1), self.done(), None
        number, deadline = 0, time.monotonic() + 3600
        main, since = self._start(), 0
        try:
            while (status := main.poll()) != 0:
                assert time.monotonic() < deadline, self.told("did not end")
                if status is not None:
                    assert since, self.told(f"ended with status {status}, and nothing was killed")
                    main, since = self._start(), 0
                self._see(main)
                if kills and moment is None and self.done() >= first + number * every:
                    moment = time.monotonic() + self.random.uniform(0, 5)
                if moment is None or time.monotonic() < moment:
                    time.sleep(0.1)
                elif self._kill_main(main) if kills[0] == "main" else self._kill_job():
                    number, since, moment = number + 1, since + 1, None
                    if kills.pop(0) == "main":
                        snakemake(self.folder, *PROFILE, "--unlock")
                        main, since = self._start(), 0
            _gone, living = psutil.wait_procs(self.jobs.values(), 300)
            assert not living, self.told(f"still there: {living}")
        finally:
            for process in [psutil.Process(main.pid)] if main.poll() is None else []:
                process.kill()
            for process in self.jobs.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _start(self) -> subprocess.Popen:
        self.note("start")
        with open(self.folder / "run.log", "a") as out:
            words = ["snakemake", *PROFILE, "--cores", "2", TARGET]
            return subprocess.Popen(words, cwd=self.folder, env=environment(), stdout=out, stderr=out)

    def _see(self, main: subprocess.Popen) -> None:
        """Remember the jobs of this Snakemake; psutil tells a process from a later one with the same number."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(main.pid).children(recursive=True):
                self.jobs.setdefault(process.pid, process)
        self.jobs = {pid: process for pid, process in self.jobs.items() if _lives(process)}

    def _kill_main(self, main: subprocess.Popen) -> bool:
        main.send_signal(signal.SIGSTOP)
        self._see(main)
        if not _killed(psutil.Process(main.pid)):
            return False
        assert main.wait() == -signal.SIGKILL
        self.hits["main"] += 1
        self.note(f"kill main {main.pid}, orphans {sorted(self.jobs)}", self.folder / "run.log")
        return True

    def _kill_job(self) -> bool:
        """Kill one process of a running job, or the job with all it started; the job may be an orphan."""
        chosen = [p for p in self.jobs.values() if "llmfusion." in " ".join(_words(p))]
        if not chosen:
            return False
        process = self.random.choice(chosen)
        words, kind = " ".join(_words(process)), self.random.choice(["process", "group"])
        group = [process]
        if kind == "group":
            with contextlib.suppress(psutil.NoSuchProcess):
                group += process.children(recursive=True)
        if not [p for p in group if _killed(p)]:
            return False
        out = re.search(r"--out \S*?results/(\S+?)(/manifest)?\.(json|csv)", words)
        log = self.folder / "runs/tiny/logs" / f"{out[1] if out else 'unknown'}.log"
        self.hits["job"] += 1
        self.note(
            f"kill job {kind} {[p.pid for p in group]} {words.split()[0].rsplit('/')[-1]} {out[1] if out else words[:80]}",
            log,
        )
        return True

    def note(self, what: str, log: Path | None = None) -> None:
        last = said(log).strip().splitlines()[-1:] if log else []
        line = f"{time.monotonic() - self.began:7.1f} s  {self.done():2}/{len(self.names)} done  {what}{f' | {last[0][:90]}' if last else ''}"
        self.protocol.append(line)
        with open(self.folder / "kills.log", "a") as file:
            file.write(line + "\n")

    def told(self, what: str) -> str:
        return "\n".join([what, *self.protocol, said(self.folder / "run.log")[-4000:]])


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _killed(process: psutil.Process) -> bool:
    """Kill a process; False if it had ended by itself. It is stopped first, so that it cannot end in between."""
    try:
        process.suspend()
        hit = _lives(process)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return hit


def same_as_undisturbed(folder: Path, made: Path) -> None:
    """Every table, score and manifest is there with the same bytes, they verify, and nothing else lies about."""
    mine, theirs = results(folder), results(made)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    done = subprocess.run(
        [sys.executable, "-m", "llmfusion.cli.verify", "runs/tiny/results/table2.csv"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "all match" in done.stdout
    tiny = folder / "runs/tiny"
    left = list((tiny / "results").rglob(".*")) + [
        p for p in (tiny / "work").rglob("*") if p.is_file() and not p.name.startswith("lease")
    ]
    assert [str(p.relative_to(tiny)) for p in left] == []


def without(made: Path, folder: Path, *gone: str) -> Path:
    """Put the finished study into ``folder``, without some artifacts."""
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    for name in gone:
        path = folder / "runs/tiny/results" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


LEAF = (
    "models/trained/seqkd-code",
    "answers/trained/seqkd-code",
    "scores/trained/seqkd-code",
    "table2.csv",
    "table2.md",
    "table2.json",
)  # nothing else needs them


def test_snakemake_killed_and_a_job_killed_give_the_undisturbed_result(made: Path, project: Project) -> None:
    ordeal = Ordeal(without(made, project("two-kills"), *LEAF), made, seed=1)
    ordeal.run(["main", "job"])
    assert ordeal.hits == {"main": 1, "job": 1}, ordeal.told("")
    same_as_undisturbed(ordeal.folder, made)


@pytest.mark.long
def test_many_kills_at_random_moments_give_the_undisturbed_result(made: Path, project: Project) -> None:
    count, seed = int(os.environ.get("LLMFUSION_KILLS", "20")), int(os.environ.get("LLMFUSION_SEED", "0"))
    left = ["main", "job"] * (count // 2) + ["job"] * (count % 2)
    Random(seed).shuffle(left)
    hits = 0
    while left:
        ordeal = Ordeal(project("kills"), made, seed + len(left))
        ordeal.run(left)
        print("\n".join(ordeal.protocol))
        hits += sum(ordeal.hits.values())
        same_as_undisturbed(ordeal.folder, made)
    assert hits == count


@pytest.mark.long
def test_a_second_snakemake_is_told_of_the_first(made: Path, project: Project) -> None:
    folder = without(made, project("locked"), *LEAF)
    words = ["snakemake", *PROFILE, "--cores", "2", TARGET]
    first = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait((folder / "runs/tiny/work/models/trained/seqkd-code/lease").exists, first)
    second = snakemake(folder, *words[1:], fails=True)
    assert "Directory cannot be locked" in second
    assert "Traceback" not in second
    assert first.wait() == 0
    same_as_undisturbed(folder, made)


@pytest.mark.long
def test_two_snakemakes_without_a_lock_have_one_writer_an_artifact(made: Path, project: Project) -> None:
    folder = project("two")
    words = ["snakemake", *PROFILE, "--cores", "1", "--nolock", TARGET]
    logs = [folder / f"run{i}.log" for i in range(2)]
    both = [
        subprocess.Popen(words, cwd=folder, env=environment(), stdout=log.open("w"), stderr=subprocess.STDOUT)
        for log in logs
    ]
    most: Counter[str] = Counter()
    while any(process.poll() is None for process in both):
        drafts = Counter(str(draft).rsplit(".", 2)[0] for draft in (folder / "runs/tiny/results").rglob(".*.draft"))
        most |= drafts
        time.sleep(0.05)
    adopted = sum("adopted" in said(log) for log in (folder / "runs/tiny/logs").rglob("*.log"))
    print(
        f"ended with {[process.returncode for process in both]}; {len(most)} artifacts made, {adopted} of them adopted by the other"
    )
    assert set(most.values()) == {1}
    assert adopted
    if any(process.returncode for process in both):  # one removed what the other was about to read: told, not wrong
        snakemake(folder, *words[1:])
    same_as_undisturbed(folder, made)
