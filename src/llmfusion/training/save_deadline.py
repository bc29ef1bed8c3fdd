"""When a training whose time is limited has to stop: how long before the end of its time it must begin to save."""

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
    """How long before the end of its time a job must begin to save: measured, and estimated until the first save.

    ``parameters``: of the model; a resume state is its weights and two moments in float32.
    """

    # seconds: a scheduler's clock runs while two Snakemakes start ahead of this process, and while it ends
    STARTUP = 60.0
    BYTES_PER_SECOND = 2e8  # written and hashed, on a slow network disk

    def __init__(self, parameters: int):
        self.slowest_step = 0.0
        self.slowest_save = 12 * parameters / self.BYTES_PER_SECOND
        self._is_measured = False

    def seconds(self, minutes: float) -> float:
        """Seconds to keep back of a job of ``minutes``.

        The start-up (a quarter of a short job's time), and one more step and a save, each a fifth slower than the
        slowest so far.
        """
        return min(self.STARTUP, 15 * minutes) + 1.2 * (self.slowest_step + self.slowest_save)

    def is_over(self, limit: TimeLimit | None) -> bool:
        """Whether a job with this limit has to save and end now."""
        return limit is not None and limit.seconds_left() < self.seconds(limit.minutes)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step."""
        began = time.monotonic()
        yield
        self.slowest_step = max(self.slowest_step, time.monotonic() - began)

    @contextmanager
    def save(self) -> Iterator[None]:
        """Measure a save; the first one replaces the estimate."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.slowest_save = max(self.slowest_save, seconds) if self._is_measured else seconds
        self._is_measured = True
