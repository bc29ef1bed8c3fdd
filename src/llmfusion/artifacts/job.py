"""How an artifact is made: verified inputs, the lease, a draft folder, publication."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmfusion.artifacts import provenance, store
from llmfusion.artifacts.lease import Lease
from llmfusion.artifacts.store import Artifact, Draft
from llmfusion.artifacts.usage import Usage
from llmfusion.errors import UserError
from llmfusion.io import job_log
from llmfusion.io.digests import fingerprint_of
from llmfusion.io.files import format_bytes, json_object_or_empty, read_json_object, sha256_file
from llmfusion.study.addresses import FINGERPRINTS, address_of, is_shard

if TYPE_CHECKING:
    from llmfusion.study.kinds import StepSpec

SpecT = TypeVar("SpecT", bound="StepSpec")
BAD_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EIO, errno.ESTALE,
)  # fmt: skip
BAD_PLACE_ADVICE = "a study's folders must be folders that this user may read and write; nothing was published"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a rule asks for: a spec as canonical JSON, the declared output and inputs, time limit and log."""

    spec: str
    out: Path
    inputs: list[str]
    time_limit_minutes: float | None = None
    log: Path | None = None  # None: what is printed stays on standard output and error
    command: str = ""  # that makes this artifact again: the first line of the log


@dataclass
class Job:
    """What a step's ``build`` gets: its spec, verified inputs, a folder to write to and one to resume from."""

    spec: str  # canonical JSON; parse() gives it as the model that wrote it
    inputs: dict[str, Artifact]
    folder: Path  # the draft: what is written here is published
    work: Path  # resume state
    facts: dict[str, Any]  # for the manifest
    key: str  # of the resume state: this spec over the very content of these inputs
    time_limit_minutes: float | None
    # what the time limit is counted from; the same clock in all processes of a machine
    began: float = field(default_factory=time.monotonic)
    start_seconds: float | None = None  # seconds until the work itself began, as mark_started() recorded them
    measured: dict[str, Any] = field(default_factory=dict)  # for the provenance: what differs from run to run
    disk_needs: str = ""  # what require_disk() was last told, for the message where the disk fills all the same
    rights: int = 0o777  # permission bits that what it publishes may have, by restrict_to_readers_of()

    def parse(self, model: type[SpecT]) -> SpecT:
        """The spec as the pydantic model that wrote it, with defaults filled in.

        Raises :class:`UserError` for a spec of another kind.
        """
        from pydantic import ValidationError

        try:
            return model.model_validate_json(self.spec)
        except ValidationError as error:
            mistakes = (f"{'.'.join(map(str, one['loc'])) or 'JSON'}: {one['msg']}" for one in error.errors())
            raise UserError(f"--spec is not a spec of this step: {'; '.join(mistakes)}") from None

    def input(self, address: str) -> Artifact:
        """One input by address; a job that asks for an artifact its rule did not declare is a defect of the graph."""
        if address not in self.inputs:
            raise UserError(f"{address} is not among this job's inputs: {', '.join(self.inputs)}")
        return self.inputs[address]

    def elapsed(self) -> float:
        """Seconds since this job was started, the wait for another writer included."""
        return time.monotonic() - self.began

    def mark_started(self) -> None:
        """Record that everything is loaded and the work itself begins: the time that grows with the study's size."""
        self.start_seconds = round(self.elapsed(), 3)

    def require_disk(self, what: str, result: int, resume: int = 0) -> None:
        """Raise :class:`UserError` where ``result`` bytes, or ``resume`` bytes in ``work/``, do not fit the disk."""
        self.disk_needs = f"{what} needs {format_bytes(result + resume)}"
        wanted: dict[int, int] = {}
        for place, size in ((self.folder, result), (self.work, resume)):
            device = place.stat().st_dev
            wanted[device] = wanted.get(device, 0) + size
            free = shutil.disk_usage(place).free
            if free < wanted[device]:
                needs = f"{what} needs {format_bytes(wanted[device])}"
                message = f"{needs}, {format_bytes(free)} are free in {place.parent.resolve()}"
                raise UserError(f"{message}: free some, or move the study's `directory`. Nothing was made")

    def restrict_to_readers_of(self, source: Path) -> None:
        """Publish to nobody who may not read ``source``, a file or folder outside the study that is read here.

        One that is not there, or cannot be reached, restricts nothing: whoever reads it says so.
        """
        with suppress(OSError):
            self.rights &= store.readers(source)
        for folder in (self.folder, self.work):
            _restrict(folder, self.rights)

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
        """The job in another process, whose parent has verified the inputs: they are not hashed again."""
        inputs = {address: _unverified(Path(folder)) for address, folder in state["inputs"].items()}
        return cls(**{**state, "inputs": inputs, "folder": Path(state["folder"]), "work": Path(state["work"])})


def _unverified(folder: Path) -> Artifact:
    path = folder / "manifest.json"
    return Artifact(folder, read_json_object(path), sha256_file(path))


def run_job(request: Request, build: Callable[[Job], None]) -> None:
    """Make the artifact that ``request`` asks for.

    Waits for another writer of the same artifact and adopts what it made. The draft folder is removed on any error;
    resume state in ``work/`` stays until the artifact is published. Raises :class:`UserError` for what the user can
    mend, a full disk included, and whatever else ``build`` raises.
    """
    with explain_full_disk(request.out), explain_bad_places():
        _run_job(request, build)


@contextmanager
def explain_bad_places() -> Iterator[None]:
    """Turn an error of what lies in ``results/`` or ``work/`` into a :class:`UserError`: no right to read or write it,

    a file where a folder is expected, a disk that does not answer.
    """
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else Path()
        if error.errno not in BAD_PLACE or not {"results", "work"} & set(place.parts):
            raise
        raise UserError(f"{place}: {error.strerror}: {BAD_PLACE_ADVICE}") from error


@contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turn an error that a full disk causes into a :class:`UserError` that says what was needed and what is free."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(_disk_full_message(output, error)) from error
        raise


def _is_disk_full(error: Exception) -> bool:
    """Also a full quota, and what safetensors and torch raise: no OSErrors, and torch does not name the cause."""
    full = (errno.ENOSPC, errno.EDQUOT)
    messages = [*map(os.strerror, full), "inline_container.cc"]
    return getattr(error, "errno", None) in full or any(message in str(error) for message in messages)


def _disk_full_message(output: Path, error: Exception) -> str:
    needs = "".join(f"{note}; " for note in getattr(error, "__notes__", []))
    place = next(folder for folder in output.absolute().parents if folder.exists())
    free = f"{format_bytes(shutil.disk_usage(place).free)} are free in {Path.cwd()}"
    return f"the disk is full while making {output}: {needs}{free}; free some and run again"


def _run_job(request: Request, build: Callable[[Job], None]) -> None:
    started = time.time()
    began = time.monotonic()
    before = store.identity(request.out)
    address = address_of(request.out)
    work = Path("work") / address
    if request.log is not None:
        job_log.put_back(request.log)
    with Lease(work / "lease", before) as lease, _log_of(request), Usage(lease.waited_seconds) as usage:
        if lease.taken_over is not None:
            before = lease.taken_over["note"]
        inputs = _verified_inputs(request, address)
        # the content of shards becomes the artifact's own: it does not count them as inputs
        made_from = {source: artifact for source, artifact in inputs.items() if not is_shard(source)}
        draft = Draft(address, request.spec, made_from, store.draft_folder(request.out, lease.token))
        store.remove_drafts(request.out)
        if draft.made_already(request.out, before):
            logger.info("%s was finished meanwhile; adopted", request.out)
        else:
            limit = request.time_limit_minutes
            job = Job(request.spec, inputs, draft.folder, work, draft.facts, draft.key, limit, began)
            _build_and_publish(job, build, draft, request.out, lease, usage, started)
        _clear(work)


@contextmanager
def _log_of(request: Request) -> Iterator[None]:
    """Everything that is said from now on goes to the job's log, beginning with the command."""
    with job_log.written_to(request.log) if request.log is not None else nullcontext():
        if request.command:
            print("#", request.command, flush=True)
        yield


def _verified_inputs(request: Request, address: str) -> dict[str, Artifact]:
    """The declared inputs that are artifacts of the study, by address; files of the user's own are not."""
    manifests = {address_of(path): path for path in request.inputs if path.startswith("results/")}
    for source, path in manifests.items():
        _sweep(Path(path), Path("work") / source)
    expected = _expected_fingerprints(address, request.spec, list(manifests))
    return {source: store.read(path, fingerprint=expected.get(source)) for source, path in manifests.items()}


def _expected_fingerprints(address: str, spec: str, sources: list[str]) -> dict[str, str]:
    """The fingerprints that the study asks of this job's inputs.

    Empty where :data:`FINGERPRINTS` is absent or of another study: then they do not give the one that it has of this
    job's own artifact.
    """
    planned = json_object_or_empty(FINGERPRINTS)
    known = {source: str(planned.get(source)) for source in sources}
    own = fingerprint_of(spec, (known[source] for source in sources if not is_shard(source)))
    return known if own == planned.get(address) else {}


def _build_and_publish(
    job: Job, build: Callable[[Job], None], draft: Draft, output: Path, lease: Lease, usage: Usage, started: float
) -> None:
    draft.folder.mkdir(mode=draft.rights, parents=True)
    try:
        _restrict(job.work, draft.rights)
        build(job)
        draft.rights &= job.rights
        lease.check()
        shards = {address: _took(shard) for address, shard in job.inputs.items() if is_shard(address)}
        job_log.sync()
        start = None if job.start_seconds is None else round(job.start_seconds - lease.waited_seconds, 3)
        took = {**usage.taken(), "start_seconds": start}
        record = {**provenance.collect(started), **took, "shards": shards, **job.measured}
        store.publish(draft, output, record)
    except Exception as error:
        if isinstance(error, OSError):
            lease.check()  # the draft may be gone because another writer took over: then say that
        if job.disk_needs and _is_disk_full(error):
            error.add_note(job.disk_needs)
        raise
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)


def _restrict(folder: Path, rights: int) -> None:
    """Take the other rights on a folder away, where it is this user's own."""
    mode = folder.stat().st_mode
    if mode & 0o777 & ~rights:
        with suppress(PermissionError):
            folder.chmod(mode & ~0o777 | mode & rights)


def _took(shard: Artifact) -> dict[str, Any]:
    """What a shard took, as its provenance says: its folder need not be kept."""
    record = json_object_or_empty(shard.folder / "provenance.json")
    return {key: record[key] for key in ("seconds", "memory_mb", "gpu", "gpu_peak_mb") if key in record}


def _clear(work: Path) -> None:
    """Remove resume state of a finished artifact.

    The lease goes with its ``with``; other names that begin with "lease" may be a waiting writer's.
    """
    for path in work.iterdir():
        if not path.name.startswith("lease"):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else os.unlink(path)


def _sweep(output: Path, work: Path) -> None:
    """Remove what the writer of an input left behind if it was killed after publishing; waits where one still lives."""
    if store.drafts_of(output) or any(not path.name.startswith("lease") for path in work.glob("*")):
        with Lease(work / "lease"):
            store.remove_drafts(output)
            _clear(work)
