"""What every program of the workflow shares: arguments, verified inputs, the lease, publication, errors without traceback."""

import argparse
import errno
import json
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfusion import artifacts, provenance, warm
from llmfusion.artifacts import SHARDS, Artifact, Draft
from llmfusion.errors import UserError, redacted
from llmfusion.lease import Lease


@dataclass
class Job:
    """What a step's ``build`` gets: the spec, its verified inputs by address, a folder to write into and one to resume from."""

    spec: dict[str, Any]
    inputs: dict[str, Artifact]
    folder: Path
    work: Path
    facts: dict[str, Any]
    key: str
    minutes: float | None
    began: float = field(default_factory=time.monotonic)  # what its minutes are counted from; the same clock in all processes
    start: float | None = None  # seconds until the work itself began, as begins() noted them
    measured: dict[str, Any] = field(default_factory=dict)  # for its provenance: what is not the same at every run
    needs: str = ""  # what need() was told, for the message where the disk fills all the same

    def input(self, address: str) -> Artifact:
        """One input by address; a job asked for an artifact its rule did not declare is a defect of the plan."""
        if address not in self.inputs:
            raise UserError(f"{address} is not among this job's inputs: {', '.join(self.inputs)}")
        return self.inputs[address]

    def elapsed(self) -> float:
        """Seconds since this job was started, the wait for another writer included."""
        return time.monotonic() - self.began

    def begins(self) -> None:
        """Note that everything is loaded and the work itself begins: what comes from here on grows with the study's size."""
        self.start = round(self.elapsed(), 3)

    def need(self, what: str, result: int, resume: int = 0) -> None:
        """Refuse the job (:class:`UserError`) where its result, or its resume state in ``work/``, cannot be written: bytes of both."""
        self.needs = f"{what} needs {amount(result + resume)}"
        wanted: dict[int, int] = {}
        for place, size in ((self.folder, result), (self.work, resume)):
            device = place.stat().st_dev
            wanted[device] = wanted.get(device, 0) + size
            free = shutil.disk_usage(place).free
            if free < wanted[device]:
                told = f"{what} needs {amount(wanted[device])}, {amount(free)} are free in {place.parent.resolve()}"
                raise UserError(f"{told}: free some, or move the study's `directory`. Nothing was made")


def run(step: str, build: Callable[[Job], None]) -> int:
    """Entry point of a step: make the artifact ``--out`` from ``--spec`` and ``--inputs``. Returns the exit status.

    Waits for another writer of the same artifact and adopts what it made. Anything the user can mend is told in one
    message; the draft folder goes, resume state in ``work/`` stays until the artifact is published.
    """
    parser = argparse.ArgumentParser(prog=f"python -m llmfusion.{step}")
    parser.add_argument("--spec", required=True, help="what to make: canonical JSON, as the study's plan gives it")
    parser.add_argument("--out", required=True, type=Path, help="the declared output, results/.../manifest.json")
    parser.add_argument("--inputs", nargs="*", default=[], help="the declared inputs")
    parser.add_argument("--minutes", type=float, default=None, help="time this job has from its start; a training saves before it ends")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if warm.ADDRESS in os.environ:
            return warm.ask(f"llmfusion.{step}")
        print("#", shlex.join([*parser.prog.split(), *sys.argv[1:]]), flush=True)
        _make(given, build)
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _disk_full(error):
            print(redacted(traceback.format_exc()), file=sys.stderr)
            return 1
        needs = "".join(f"{note}; " for note in getattr(error, "__notes__", []))
        place = next(folder for folder in given.out.absolute().parents if folder.exists())
        told = f"{needs}{amount(shutil.disk_usage(place).free)} are free in {Path.cwd()}"
        print(f"error: the disk is full while making {given.out}: {told}; free some and run again", file=sys.stderr)
        return 1
    return 0


def amount(size: float) -> str:
    """A number of bytes as the user is told it."""
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.0f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"


def _disk_full(error: Exception) -> bool:
    """Also a full quota, and what safetensors and torch raise: no OSErrors, and torch does not tell the cause."""
    full = (errno.ENOSPC, errno.EDQUOT)
    told = [*map(os.strerror, full), "inline_container.cc"]
    return getattr(error, "errno", None) in full or any(words in str(error) for words in told)


def _make(given: argparse.Namespace, build: Callable[[Job], None]) -> None:
    started, began = time.time(), time.monotonic()
    address = artifacts.address_of(given.out)
    work = Path("work") / address
    with Lease(work / "lease") as lease:
        made = {artifacts.address_of(path): path for path in given.inputs if path.startswith("results/")}
        for source, path in made.items():
            _sweep(Path(path), Path("work") / source)
        inputs = {source: artifacts.read(path) for source, path in made.items()}
        shards = [source for source in inputs if source.startswith(SHARDS)]  # what they hold becomes the artifact's own
        made_from = {source: artifact for source, artifact in inputs.items() if source not in shards}
        draft = Draft(address, given.spec, made_from, artifacts.draft_folder(given.out, lease.token))
        artifacts.remove_drafts(given.out)
        if draft.made_already(given.out):
            print(f"{given.out} was finished meanwhile; adopted")
            _clear(work)
            return
        draft.folder.mkdir(parents=True)
        job = Job(json.loads(given.spec), inputs, draft.folder, work, draft.facts, draft.key, given.minutes, began)
        try:
            build(job)
            lease.check()
            told = {**provenance.collect(started), "start_seconds": job.start, "shards": shards, **job.measured}
            artifacts.publish(draft, given.out, told)
        except Exception as error:
            if isinstance(error, OSError):
                lease.check()  # the draft may be gone because another writer took over: then say that
            if job.needs and _disk_full(error):
                error.add_note(job.needs)
            raise
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
        _clear(work)


def _clear(work: Path) -> None:
    """Drop resume state of a finished artifact; the lease goes with its ``with``, and what begins with "lease" may be a waiting writer's."""
    for path in work.iterdir():
        if not path.name.startswith("lease"):
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)


def _sweep(output: Path, work: Path) -> None:
    """Drop what the writer of an input left behind if it was killed after publishing; waits where one still lives."""
    if artifacts.drafts_of(output) or any(not path.name.startswith("lease") for path in work.glob("*")):
        with Lease(work / "lease"):
            artifacts.remove_drafts(output)
            _clear(work)
