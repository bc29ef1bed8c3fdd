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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfusion import artifacts, provenance
from llmfusion.artifacts import Artifact, Draft
from llmfusion.errors import UserError
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

    def input(self, address: str) -> Artifact:
        """One input by address; a job asked for an artifact its rule did not declare is a defect of the plan."""
        if address not in self.inputs:
            raise UserError(f"{address} is not among this job's inputs: {', '.join(self.inputs)}")
        return self.inputs[address]


def run(step: str, build: Callable[[Job], None]) -> int:
    """Entry point of a step: make the artifact ``--out`` from ``--spec`` and ``--inputs``. Returns the exit status.

    Waits for another writer of the same artifact and adopts what it made. Anything the user can mend is told in one
    message; the draft folder goes, resume state in ``work/`` stays until the artifact is published.
    """
    parser = argparse.ArgumentParser(prog=f"python -m llmfusion.{step}")
    parser.add_argument("--spec", required=True, help="what to make: canonical JSON, as the study's plan gives it")
    parser.add_argument("--out", required=True, type=Path, help="the declared output, results/.../manifest.json")
    parser.add_argument("--inputs", nargs="*", default=[], help="the declared inputs")
    parser.add_argument("--minutes", type=float, default=None, help="time this job has; a training saves before it ends")
    given = parser.parse_args()
    print("#", shlex.join([*parser.prog.split(), *sys.argv[1:]]), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _make(given, build)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(".").free
        print(f"error: the disk is full while making {given.out}: {free / 2**20:.0f} MiB free in {Path.cwd()}; free some and run again", file=sys.stderr)
        return 1
    return 0


def _disk_full(error: Exception) -> bool:
    """Also a full quota, and safetensors, whose errors are no OSErrors."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


def _make(given: argparse.Namespace, build: Callable[[Job], None]) -> None:
    started = time.time()
    address = artifacts.address_of(given.out)
    work = Path("work") / address
    with Lease(work / "lease") as lease:
        inputs = {artifacts.address_of(path): artifacts.read(path) for path in given.inputs if path.startswith("results/")}
        draft = Draft(address, given.spec, inputs, artifacts.draft_folder(given.out, lease.token))
        if draft.made_already(given.out):
            print(f"{given.out} was finished meanwhile; adopted")
            return
        artifacts.remove_drafts(given.out)
        draft.folder.mkdir(parents=True)
        try:
            build(Job(json.loads(given.spec), inputs, draft.folder, work, draft.facts, draft.key, given.minutes))
            lease.check()
            artifacts.publish(draft, given.out, provenance.collect(started))
        except OSError:
            lease.check()  # the draft may be gone because another writer took over: then say that
            raise
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
        _clear(work)


def _clear(work: Path) -> None:
    """Drop resume state of a finished artifact; the lease goes with its ``with``, and what begins with "lease" may be a waiting writer's."""
    for path in work.iterdir():
        if not path.name.startswith("lease"):
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)
