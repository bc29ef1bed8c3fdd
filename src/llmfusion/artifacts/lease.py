"""One writer per artifact, also when an earlier writer's Snakemake was killed and started again.

A lease is a file made with O_EXCL. Its owner touches it every 30 s; it is stale after 5 minutes without a touch, or
at once when its process is gone on this host. Taking over a stale lease moves it aside first; two that try at the
same moment are told apart by the token inside, and whoever lost finds out at the latest in :meth:`Lease.check`,
before publishing.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError

TOUCH_SECONDS = 30.0
STALE_SECONDS = 300.0
POLL_SECONDS = 0.5
logger = logging.getLogger(__name__)


class Lease:
    """``with Lease(path):`` waits until no living writer holds ``path``, then holds it."""

    def __init__(self, path: Path):
        self.path = path
        self.token = uuid.uuid4().hex
        self.waited_seconds = 0.0  # until the lease was taken
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        reported = False
        began = time.monotonic()
        while not self._take():
            holder = _read(self.path)
            if holder is not None and _is_stale(self.path, holder):
                self._move_aside(holder)
                continue
            if not reported and holder is not None:
                pid = holder.get("pid")
                logger.warning("waiting for %s: held by process %s on %s", self.path, pid, holder.get("host"))
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
        private = self.path.with_name(f"{self.path.name}.{self.token}")
        private.write_text(json.dumps(holder))
        try:
            os.link(private, self.path)  # as exclusive as O_EXCL, and the content is there from the first moment
            return True
        except FileExistsError:
            return False
        finally:
            private.unlink()

    def _move_aside(self, stale: dict[str, Any]) -> None:
        aside = self.path.with_name(f"{self.path.name}.stale-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = _read(aside) or {}
        if moved.get("token") != stale.get("token"):  # somebody else took over between our look and our move
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
    return holder is not None and not _is_stale(path, holder)


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lease: None where there is no such file, empty where it cannot be read."""
    try:
        holder: dict[str, Any] = json.loads(path.read_bytes())
        return holder
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
        return _started(holder["pid"]) != holder.get("started")
    return age > STALE_SECONDS


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, None if there is none: tells a reused pid apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]
