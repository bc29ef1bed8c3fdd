"""When a training whose time is limited has to stop: what is kept back of its minutes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class TimeLimit:
    """A job's minutes, counted from ``began`` on the clock of :func:`time.monotonic`."""

    minutes: float
    began: float

    def seconds_left(self) -> float:
        """Seconds until the job is ended."""
        return self.began + 60 * self.minutes - time.monotonic()


class SaveDeadline:
    """How long before the end of its time a job must begin to save: measured, and estimated until the first save."""

    START = (
        60.0  # seconds: a scheduler's clock runs while two Snakemakes start ahead of this process, and while it leaves
    )
    BYTES_PER_SECOND = 2e8  # written and hashed, on a slow network disk

    def __init__(self, parameters: int):
        self.slowest_step, self.slowest_save = 0.0, 12 * parameters / self.BYTES_PER_SECOND
        self._measured = False

    def seconds(self, minutes: float) -> float:
        """For a job of ``minutes``: the start (a quarter of a short job's time), one more step, and a save, a fifth slower than ever."""
        return min(self.START, 15 * minutes) + 1.2 * (self.slowest_step + self.slowest_save)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step."""
        began = time.monotonic()
        yield
        self.slowest_step = max(self.slowest_step, time.monotonic() - began)

    @contextmanager
    def save(self) -> Iterator[None]:
        """Measure a save; the first one replaces the estimate, for which a resume state is weights and two moments in float32."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.slowest_save = max(self.slowest_save, took) if self._measured else took
        self._measured = True
