"""How an artifact is made: verified inputs, the lease, a draft folder, publication. Errors reach the user without a traceback."""

import errno
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmfusion.artifacts import provenance, store
from llmfusion.artifacts.lease import Lease
from llmfusion.artifacts.store import Artifact, Draft
from llmfusion.errors import UserError, redacted
from llmfusion.io.files import format_bytes as format_bytes
from llmfusion.io.files import read_json_object, sha256_file
from llmfusion.study.addresses import address_of, is_shard

if TYPE_CHECKING:
    from llmfusion.study.kinds import StepSpec

SpecT = TypeVar("SpecT", bound="StepSpec")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a rule asks for: the spec as canonical JSON, the declared output, the declared inputs, and the job's time limit in minutes."""

    spec: str
    out: Path
    inputs: list[str]
    time_limit_minutes: float | None = None


@dataclass
class Job:
    """What a step's ``build`` gets: the spec, its verified inputs by address, a folder to write into and one to resume from."""

    spec: str  # canonical JSON; parse() gives it as the model that wrote it
    inputs: dict[str, Artifact]
    folder: Path
    work: Path
    facts: dict[str, Any]
    key: str
    time_limit_minutes: float | None
    began: float = field(
        default_factory=time.monotonic
    )  # what the time limit is counted from; the same clock in all processes
    start_seconds: float | None = None  # seconds until the work itself began, as mark_started() recorded them
    measured: dict[str, Any] = field(default_factory=dict)  # for its provenance: what differs from run to run
    disk_needs: str = (
        ""  # the last requirement given to require_disk(), for the message where the disk fills all the same
    )

    def parse(self, model: type[SpecT]) -> SpecT:
        """The spec as the pydantic model that wrote it, with defaults filled in."""
        return model.model_validate_json(self.spec)

    def input(self, address: str) -> Artifact:
        """One input by address; a job that asks for an artifact its rule did not declare is a defect of the graph."""
        if address not in self.inputs:
            raise UserError(f"{address} is not among this job's inputs: {', '.join(self.inputs)}")
        return self.inputs[address]

    def elapsed(self) -> float:
        """Seconds since this job was started, the wait for another writer included."""
        return time.monotonic() - self.began

    def mark_started(self) -> None:
        """Record that everything is loaded and the work itself begins: the time from here on grows with the study's size."""
        self.start_seconds = round(self.elapsed(), 3)

    def require_disk(self, what: str, result: int, resume: int = 0) -> None:
        """Raise :class:`UserError` where the result, or the resume state in ``work/``, does not fit on the disk: bytes of both."""
        self.disk_needs = f"{what} needs {format_bytes(result + resume)}"
        wanted: dict[int, int] = {}
        for place, size in ((self.folder, result), (self.work, resume)):
            device = place.stat().st_dev
            wanted[device] = wanted.get(device, 0) + size
            free = shutil.disk_usage(place).free
            if free < wanted[device]:
                message = f"{what} needs {format_bytes(wanted[device])}, {format_bytes(free)} are free in {place.parent.resolve()}"
                raise UserError(f"{message}: free some, or move the study's `directory`. Nothing was made")

    def on_same_disk(self) -> bool:
        """Whether result and resume state share a file system, so that a file in both takes its room once."""
        return self.folder.stat().st_dev == self.work.stat().st_dev

    def to_json(self) -> dict[str, Any]:
        """What another process of the same node needs to build the same job (:meth:`from_json`)."""
        state = {key: value for key, value in asdict(self).items() if key != "inputs"}
        inputs = {address: str(artifact.folder) for address, artifact in self.inputs.items()}
        return {**state, "inputs": inputs, "folder": str(self.folder), "work": str(self.work)}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Job":
        """The job in another process. Its inputs have just been verified by the process that started this one: they are not hashed again."""
        inputs = {address: _unverified(Path(folder)) for address, folder in state["inputs"].items()}
        return cls(**{**state, "inputs": inputs, "folder": Path(state["folder"]), "work": Path(state["work"])})


def _unverified(folder: Path) -> Artifact:
    path = folder / "manifest.json"
    return Artifact(folder, read_json_object(path), sha256_file(path))


def run_job(request: Request, build: Callable[[Job], None]) -> int:
    """Make the artifact that ``request`` asks for. Returns the exit status.

    Waits for another writer of the same artifact and adopts what it made. What the user can mend is told in one message; the
    draft folder goes, resume state in ``work/`` stays until the artifact is published.
    """
    try:
        _make(request, build)
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _disk_full(error):
            print(redacted(traceback.format_exc()), file=sys.stderr)
            return 1
        needs = "".join(f"{note}; " for note in getattr(error, "__notes__", []))
        place = next(folder for folder in request.out.absolute().parents if folder.exists())
        free = f"{needs}{format_bytes(shutil.disk_usage(place).free)} are free in {Path.cwd()}"
        print(f"error: the disk is full while making {request.out}: {free}; free some and run again", file=sys.stderr)
        return 1
    return 0


def _disk_full(error: Exception) -> bool:
    """Also a full quota, and what safetensors and torch raise: no OSErrors, and torch does not name the cause."""
    full = (errno.ENOSPC, errno.EDQUOT)
    messages = [*map(os.strerror, full), "inline_container.cc"]
    return getattr(error, "errno", None) in full or any(message in str(error) for message in messages)


def _make(request: Request, build: Callable[[Job], None]) -> None:
    started = time.time()
    began = time.monotonic()
    address = address_of(request.out)
    work = Path("work") / address
    with Lease(work / "lease") as lease:
        manifests = {address_of(path): path for path in request.inputs if path.startswith("results/")}
        for source, path in manifests.items():
            _sweep(Path(path), Path("work") / source)
        inputs = {source: store.read(path) for source, path in manifests.items()}
        shards = [source for source in inputs if is_shard(source)]  # what they hold becomes the artifact's own
        made_from = {source: artifact for source, artifact in inputs.items() if source not in shards}
        draft = Draft(address, request.spec, made_from, store.draft_folder(request.out, lease.token))
        store.remove_drafts(request.out)
        if draft.made_already(request.out):
            logger.info("%s was finished meanwhile; adopted", request.out)
            _clear(work)
            return
        draft.folder.mkdir(parents=True)
        job = Job(request.spec, inputs, draft.folder, work, draft.facts, draft.key, request.time_limit_minutes, began)
        try:
            build(job)
            lease.check()
            store.publish(
                draft,
                request.out,
                {**provenance.collect(started), "start_seconds": job.start_seconds, "shards": shards, **job.measured},
            )
        except Exception as error:
            if isinstance(error, OSError):
                lease.check()  # the draft may be gone because another writer took over: then say that
            if job.disk_needs and _disk_full(error):
                error.add_note(job.disk_needs)
            raise
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
        _clear(work)


def _clear(work: Path) -> None:
    """Remove resume state of a finished artifact; the lease goes with its ``with``, and names that begin with "lease" may be a waiting writer's."""
    for path in work.iterdir():
        if not path.name.startswith("lease"):
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)


def _sweep(output: Path, work: Path) -> None:
    """Remove what the writer of an input left behind if it was killed after publishing; waits where one still lives."""
    if store.drafts_of(output) or any(not path.name.startswith("lease") for path in work.glob("*")):
        with Lease(work / "lease"):
            store.remove_drafts(output)
            _clear(work)
