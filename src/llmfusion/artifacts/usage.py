"""What a job took: wall time, CPU time and memory, of its process and of all that it started."""

import contextlib
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = (1.0, 30.0)  # between two looks at memory: the first time, and after it has doubled often enough


class Usage:
    """``with Usage(waited):`` looks at the memory of this process and its children now and then.

    ``waited``: seconds of this process's life in which it did nothing but wait, which are not counted.
    """

    def __init__(self, waited: float = 0.0):
        self.waited = waited
        self.memory = 0  # bytes, the most that was seen
        self._stop = threading.Event()

    def __enter__(self) -> "Usage":
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def taken(self) -> dict[str, Any]:
        """Seconds since this process was started, CPU seconds, and peak memory in MB (10^6 bytes).

        Memory is what all processes held at once at the most, pages that they share counted once, as it was seen
        now and then; of this process alone the peak is known exactly.
        """
        self._sample()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "seconds": round(_age() - self.waited, 3),
            "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 3),
            "memory_mb": round(max(self.memory, _own_peak()) / 1e6),
        }

    def _look(self) -> None:
        pause, longest = SAMPLE_SECONDS
        while not self._stop.wait(pause):
            self._sample()
            pause = min(2 * pause, longest)

    def _sample(self) -> None:
        import psutil

        now = 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process()
            children = own.children(recursive=True)
            for process in [own, *children] if children else []:
                with contextlib.suppress(psutil.Error):
                    now += process.memory_full_info().pss
        self.memory = max(self.memory, now)


def _age() -> float:
    """Seconds since this process was started or forked."""
    began = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]  # in ticks since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")


def _own_peak() -> int:
    """Bytes that this process held in memory at the most."""
    status = Path("/proc/self/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
