"""One writer per artifact, also when an earlier writer's Snakemake was killed and started again.

A lease is a file made with O_EXCL. Its owner touches it every 30 s; it is stale after 5 minutes without a touch, or
at once when its process is gone on this host, where both see the same processes (containers may not). Clocks of hosts
differ, so its age is measured against a file that the waiting process has just written beside it; and whatever its
time says, also one in the future, it is stale once a waiting process has seen it unchanged for 5 minutes. Taking over
a stale lease moves it aside first; two that try at the same moment are told apart by the token inside, and whoever
lost finds out at the latest in :meth:`Lease.check`, before publishing.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import stat
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError, UserError
from llmfusion.io.files import JSON_LIMIT, file_type, read_regular

TOUCH_SECONDS = 30.0
STALE_SECONDS = 300.0
POLL_SECONDS = 0.5
logger = logging.getLogger(__name__)


class Lease:
    """``with Lease(path):`` waits until no living writer holds ``path``, then holds it.

    ``note``: what its holder leaves for the one that takes over from it if it is killed (what JSON holds).
    ``taken_over``: the note of the dead writer that this one has taken over from; None if there was none.
    """

    def __init__(self, path: Path, note: Any = None):
        self.path = path
        self.note = note
        self.taken_over: dict[str, Any] | None = None  # {"note": ...}
        self.token = uuid.uuid4().hex
        self.waited_seconds = 0.0  # until the lease was taken
        self._stop = threading.Event()
        self._now = 0.0  # by the clock that stamps files here
        self._seen: tuple[int, int] | None = None  # the state of a lease that is waited for
        self._seen_since = 0.0

    def __enter__(self) -> "Lease":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        reported = False
        began = time.monotonic()
        while not self._take():
            found = _lstat(self.path)
            if found is None:
                continue
            if not stat.S_ISREG(found.st_mode):  # no writer makes such a lease
                logger.warning("%s: is a %s, no lease; removed", self.path, file_type(found.st_mode))
                self._remove_aside()
                continue
            holder = _read(self.path)
            if holder is not None and self._is_stale(found, holder):
                self._move_aside(holder)
                continue
            if not reported and holder is not None:
                logger.warning("waiting for %s%s", self.path, _describe(holder))
                reported = True
            time.sleep(POLL_SECONDS)
        self.waited_seconds = time.monotonic() - began
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if (_read(self.path) or {}).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise unless this process still holds the lease (a suspended machine can outlive its own)."""
        if (_read(self.path) or {}).get("token") != self.token:
            silence = f"while this one did not answer for {STALE_SECONDS:.0f} s"
            raise UserError(f"{self.path}: another process took over {silence}; nothing was published")

    def _take(self) -> bool:
        pid = os.getpid()
        job = os.environ.get("SLURM_JOB_ID")
        holder = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "job": job, "token": self.token}
        holder |= {"processes": _processes(), "note": self.note}
        private = self.path.with_name(f"{self.path.name}.{self.token}")
        private.write_text(json.dumps(holder))
        try:
            os.link(private, self.path)  # as exclusive as O_EXCL, and the content is there from the first moment
            return True
        except FileExistsError:
            self._now = private.stat().st_mtime
            return False
        finally:
            private.unlink()

    def _is_stale(self, found: os.stat_result, holder: dict[str, Any]) -> bool:
        """Whether nobody living holds the lease: ``found`` is its state, ``holder`` its content."""
        if _is_visible(holder) and isinstance(holder.get("pid"), int):
            started = _started(holder["pid"])
            return started is None or started != holder.get("started")
        state = (found.st_ino, found.st_mtime_ns)
        if state != self._seen:
            self._seen = state
            self._seen_since = time.monotonic()
        return self._now - found.st_mtime > STALE_SECONDS or time.monotonic() - self._seen_since > STALE_SECONDS

    def _remove_aside(self) -> None:
        """Remove what is no lease from the lease's place."""
        aside = self.path.with_name(f"{self.path.name}.stale-{self.token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            shutil.rmtree(aside) if stat.S_ISDIR(aside.lstat().st_mode) else aside.unlink()

    def _move_aside(self, stale: dict[str, Any]) -> None:
        aside = self.path.with_name(f"{self.path.name}.stale-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = _read(aside) or {}
        if moved.get("token") == stale.get("token"):
            self.taken_over = {"note": stale.get("note")} if "note" in stale else None
        else:  # somebody else took over between our look and our move
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            if (_read(self.path) or {}).get("token") != self.token:
                return  # somebody else's now: keeping it fresh would hold up everybody
            with contextlib.suppress(OSError):
                os.utime(self.path)


def is_held(path: Path) -> bool:
    """Whether a living writer holds a lease."""
    holder = _read(path)
    found = _lstat(path)
    if holder is None or found is None:
        return False
    lease = Lease(path)
    lease._now = time.time()
    return not lease._is_stale(found, holder)


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lease: None where there is no such file, empty where it cannot be read."""
    try:
        holder = json.loads(read_regular(path, limit=JSON_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, DamagedError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _lstat(path: Path) -> os.stat_result | None:
    """The state of a file, not of what it links to; None where there is none."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _describe(holder: dict[str, Any]) -> str:
    """A holder, as the end of a message."""
    if "pid" not in holder:
        return f": held by a writer that cannot be read; taken over after {STALE_SECONDS:.0f} s without a sign of life"
    return f": held by process {holder['pid']} on {holder.get('host')}"


def _is_visible(holder: dict[str, Any]) -> bool:
    """Whether a living holder would be among the processes that can be seen here."""
    return holder.get("host") == socket.gethostname() and holder.get("processes", _processes()) == _processes()


def _processes() -> str | None:
    """Which processes can be seen from here: those of one start of one kernel, in one namespace; None if unknown.

    Containers and copied virtual machines may share a host name, and not their processes.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, None if there is none: tells a reused pid apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]
