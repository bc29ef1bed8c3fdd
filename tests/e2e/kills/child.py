"""One step in a forked child that is killed before a given thing it does to a file.

The child is a fork, so that nothing is imported twice. The names of a training's resume state stand here only.
"""

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmfusion.artifacts import provenance
from llmfusion.artifacts.job import Job, Request, run_job
from llmfusion.cli.main import main
from llmfusion.study.addresses import output_of
from llmfusion.study.kinds import all_kinds
from tests.unit.stand_ins import ARCHITECTURE

MIX, MODEL, CACHE, MERGED = "data/mix/m", "models/base/p", "teachers/base/p/m", "models/merged/m"
STATE = f"work/{MODEL}/state"  # of a training
STATE_FILE = "step-00000003"  # of the state after three steps, with one of the two suffixes
STATE_SUFFIXES = ("safetensors", "json")  # the state, and the note without which it does not count
STATE_DAMAGED = "is damaged or was not finished; taking the one before"
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod")
TRAINING: dict[str, Any] = {
    "kind": "scratch",
    "mix": "m",
    "steps": 4,
    "batch_size": 4,
    "lr": 1e-2,
    "seed": 3,
    "save_dtype": "float32",
    "tokenizer": {"vocabulary_size": 300},
    "architecture": {**ARCHITECTURE, "num_hidden_layers": 1},
}
Watch = Callable[[str], None]


@dataclass
class Ended:
    """A child that has ended: its exit status, what it did to files, the steps it trained, what it printed."""

    status: int
    events: list[str]
    steps: list[int]
    output: str

    def first(self, *words: str) -> int:
        """Number of the first thing done to a file that these words describe."""
        return next(n for n, event in enumerate(self.events, 1) if all(word in event for word in words))


@dataclass
class Undisturbed(Ended):
    """The training that nothing disturbed, and the files of its model."""

    model: dict[str, bytes]


def train(
    place: Path,
    kill_at: int = 0,
    prepare: Callable[[], None] = lambda: None,
    words: tuple[str, ...] = (),
    kill_with: int = signal.SIGKILL,
    **changed: Any,
) -> Ended:
    """Make the model in ``place`` with a save after each step; the child is ended before the ``kill_at``-th event."""

    def build(watch: Watch) -> int:
        from transformers import modeling_utils

        from llmfusion.training import loop, resume_state

        _watch_writer(watch, resume_state, "write_tensors")
        _watch_writer(watch, modeling_utils, "safe_save_file")
        _watch_steps(watch)
        _add_dropout()
        loop.SAVE_SECONDS = -1.0
        prepare()
        return main([*step_words("stage_base", MODEL, [MIX], base={**TRAINING, **changed}), *words])

    return forked(place, build, kill_at, kill_with)


def capture(place: Path, kill_at: int = 0) -> Ended:
    """Capture the model in ``place`` over its mix of 16 samples, in four chunks."""

    def build(watch: Watch) -> int:
        import safetensors.torch

        from llmfusion.teachers import cache_format

        cache_format.CHUNK_SAMPLES["hidden"] = 4
        _watch_writer(watch, safetensors.torch, "save_file")
        options = {"capture": {"batch_size": 2}, "mix": "m", "model": "base/p"}
        return main(step_words("capture_teacher", CACHE, [MODEL, MIX], **options))

    return forked(place, build, kill_at)


def merge(place: Path, kill_at: int = 0) -> Ended:
    """Merge the models ``base/a`` and ``base/b`` in ``place`` over ``base/p``, tensor by tensor."""

    def build(watch: Watch) -> int:
        options = {"method": "rsaf", "pivot": "base/p", "parents": ["base/a", "base/b"], "out_dtype": "float32"}
        inputs = [MODEL, "models/base/a", "models/base/b"]
        return main(step_words("merge_models", MERGED, inputs, merge=options))

    return forked(place, build, kill_at)


def table(place: Path, text: str, kill_at: int = 0) -> Ended:
    """Make a table of two files, as :mod:`llmfusion.steps.table` does."""

    def fill(job: Job) -> None:
        for suffix in ("csv", "md"):
            (job.folder / f"table2.{suffix}").write_text(f"{suffix}: {json.loads(job.spec)['text']}")

    def build(watch: Watch) -> int:
        run_job(Request(json.dumps({"text": text}), Path("results/table2.csv"), []), fill)
        return 0

    return forked(place, build, kill_at)


def step_words(rule: str, address: str, inputs: list[str], **spec: Any) -> list[str]:
    """The command of a step, as its rule starts it."""
    kind = all_kinds()[rule]
    text = json.dumps({"step": kind.step, "recipe": kind.recipe, **spec}, sort_keys=True)
    return ["step", rule, "--spec", text, "--out", output_of(address), "--inputs", *map(output_of, inputs)]


def files_of(place: Path, address: str) -> dict[str, bytes]:
    """Weights, metrics, manifest and all else of an artifact in ``place``; empty if there is none."""
    folder = (place / output_of(address)).parent
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"} if folder.exists() else {}


def left_over(place: Path, *artifacts: str) -> list[str]:
    """Files besides those of some artifacts, but for the private file of a waiting writer that was killed."""
    results = {str(p.relative_to(place / "results")) for p in place.glob("results/*/*/*")} - {*artifacts, MIX}
    work = {str(p.relative_to(place)) for p in place.rglob("work/**/*") if p.is_file()}
    return sorted(results | {name for name in work if not re.search(r"/lease\.[0-9a-f]{32}$", name)})


def kill_and_go_on(
    run: Callable[..., Ended],
    place: Path,
    kill_at: int,
    address: str,
    expected: dict[str, bytes],
    before: dict[str, bytes] | None = None,
    between: Callable[[], object] = lambda: None,
) -> tuple[Ended, Ended]:
    """Kill a step before an event and run it again. Returns both ends.

    At any time readers see the whole new artifact or none (or the one from ``before``), in the end the expected one.
    """
    killed = run(place, kill_at=kill_at)
    where = f"killed at {kill_at}: {killed.events[-1]}"
    assert killed.status == -signal.SIGKILL, (where, killed.output)
    assert files_of(place, address) in ({}, expected, before or {}), where
    between()
    again = run(place)
    assert again.status == 0, (where, again.output)
    assert files_of(place, address) == expected, where
    return killed, again


def forked(place: Path, build: Callable[[Watch], int], kill_at: int = 0, kill_with: int = signal.SIGKILL) -> Ended:
    """Run ``build`` in a child in ``place``, recording what it does to files there."""
    events, log = place.with_name(f"{place.name}.events"), place.with_name(f"{place.name}.log")
    with open(events, "wb") as recorded, open(log, "w", buffering=1) as printed:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
                # renews torch's pool, which a fork leaves behind, before two threads of the child try to at once
                torch.set_num_threads(1)
                sys.stdout = sys.stderr = printed
                os.chdir(place)
                provenance.collect = lambda started: {}
                status = build(_watch(place, recorded.fileno(), kill_at, kill_with))
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = events.read_text().splitlines()
    steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    return Ended(status, [line for line in lines if not line.startswith("step ")], steps, log.read_text())


def _watch(place: Path, file: int, kill_at: int, kill_with: int) -> Watch:
    """A function to call with everything done to a file; Python's own file functions call it by an audit hook."""
    count = 0

    def watch(event: str) -> None:
        nonlocal count
        if event.startswith("half") and count + 1 == kill_at and kill_with == signal.SIGKILL:
            path = event.removeprefix("half ")
            os.truncate(path, os.path.getsize(path) // 2)
        os.write(file, f"{event}\n".encode())
        if not event.startswith("step "):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), kill_with)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in FILE_EVENTS:
            return
        if isinstance(arguments[0], int):  # a file that is open
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(str(place)) or not os.path.isabs(path):
            if event == "os.mkdir" and os.path.isdir(path):
                return
            watch(f"{event} {path}")

    # and no more: a real one is slow, and a kill loses nothing that was written
    os.fsync = lambda handle: watch(f"fsync {os.readlink(f'/proc/self/fd/{handle}')}")
    sys.addaudithook(hook)
    return watch


def _watch_writer(watch: Watch, module: Any, name: str) -> None:
    """safetensors are written without an audit event; also a file half written is a moment to be killed at."""
    write = getattr(module, name)

    def watched(tensors: Any, path: Any, *more: Any, **named: Any) -> Any:
        watch(f"write {path}")
        result = write(tensors, path, *more, **named)
        watch(f"half {path}")
        return result

    setattr(module, name, watched)


def _watch_steps(watch: Watch) -> None:
    """Record the steps that are trained."""
    from llmfusion.training.loop import _Loop

    one = _Loop._step

    def recorded(self: Any, number: int, samples: list[int]) -> None:
        one(self, number, samples)
        watch(f"step {number}")

    _Loop._step = recorded  # type: ignore[method-assign]


def _add_dropout() -> None:
    """Train with dropout, which no option asks for: going on then needs the random state, too."""
    from llmfusion.models import scratch

    make = scratch.make_model

    def with_dropout(*arguments: Any) -> Any:
        model = make(*arguments)
        for part in (model.config, *(module for module in model.modules() if hasattr(module, "attention_dropout"))):
            part.attention_dropout = 0.1
        return model

    scratch.make_model = with_dropout


def copied(place: Path, name: str) -> Path:
    """A copy of ``place`` beside it."""
    return shutil.copytree(place, place.with_name(name))
