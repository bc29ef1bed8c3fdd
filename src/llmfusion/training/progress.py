"""The progress of a training: a bar on a terminal, else a line now and then; tokens a second and MFU for provenance.

Times are no part of the result: they go beside the manifest, never into ``metrics.jsonl``, which is the same at every
run.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmfusion.study.kinds.train_model import FLOPS_PER_PARAMETER_AND_TOKEN
from llmfusion.training.distributed import rank, world_size
from llmfusion.training.peaks import peak_of

logger = logging.getLogger(__name__)
LOG_SECONDS = 30.0  # between lines in a log


class ProgressMeter:
    """Measures steps and reports them, in the first process only.

    ``parameters``: of the student, for MFU = 6 parameters tokens/s / peak FLOP/s of all devices (bfloat16, dense).
    """

    def __init__(self, steps: int, parameters: int):
        self.steps = steps
        self.parameters = parameters
        self.last_line = -math.inf
        self.steps_measured = 0
        self.total_seconds = 0.0  # of all steps measured; the next three since the last timing
        self.seconds = 0.0
        self.tokens = 0
        self.padded = 0
        self.peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.bar: Any = None

    def begin(self, first: int) -> None:
        """Show a bar, where standard error is a terminal, from step ``first`` on."""
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, initial=first, unit="step")

    @contextmanager
    def step(self, tokens: int, padded: int) -> Iterator[None]:
        """Measure a step over so many tokens and padded places, those of all processes."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.steps_measured += 1
        self.total_seconds += seconds
        self.seconds += seconds
        self.tokens += tokens
        self.padded += padded

    def timing(self, step: int) -> dict[str, Any]:
        """Of the steps since the last one: seconds, tokens a second, padded share; MFU on a GPU whose peak is known."""
        timing = {
            "step": step,
            "seconds": round(self.seconds, 4),
            **self._speed(),
            "padding": round(self.padded / max(self.tokens + self.padded, 1), 4),
        }
        self.seconds = 0.0
        self.tokens = 0
        self.padded = 0
        return timing

    def report(self, step: int, loss: float, lr: float) -> None:
        """Show where the training is after ``step`` steps."""
        if rank() != 0:
            return
        status = f"loss {loss:.4f} lr {lr:.3g}{self._speed_text()}"
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update()
        elif step == self.steps or time.monotonic() - self.last_line >= LOG_SECONDS:
            self.last_line = time.monotonic()
            seconds_left = self.total_seconds / self.steps_measured * (self.steps - step)
            logger.info("step %d/%d %s, %s left", step, self.steps, status, _duration(seconds_left))

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()

    def _speed(self) -> dict[str, float]:
        tokens_per_second = self.tokens / max(self.seconds, 1e-9)
        speed = {"tokens_per_second": round(tokens_per_second, 1)}
        if self.peak is not None:
            flops = FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * tokens_per_second
            speed["mfu"] = round(flops / (self.peak * world_size()), 4)
        return speed

    def _speed_text(self) -> str:
        if not self.tokens:
            return ""
        speed = self._speed()
        mfu = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
        return f", {speed['tokens_per_second']:,.0f} tokens/s{mfu}"


def _duration(seconds: float) -> str:
    """``47 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
