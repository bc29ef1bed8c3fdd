"""Watching a training: a bar on a terminal, else a line now and then; tokens a second and MFU for its provenance.

Times are no part of the result: they go beside the manifest, never into ``metrics.jsonl``, which is the same at every run.
"""

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

QUIET = 30.0  # seconds between lines in a log


class ProgressMeter:
    """Measures steps and tells of them, in the first process only.

    ``parameters``: of the student, for MFU = 6 parameters tokens/s / peak FLOP/s of all devices (bfloat16, dense).
    """

    def __init__(self, steps: int, parameters: int):
        self.steps, self.parameters = steps, parameters
        self.told = -math.inf
        self.tokens = self.padded = self.done = 0
        self.seconds = self.taken = 0.0  # since the last timing, and since the start
        self.peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.bar: Any = None

    def begin(self, first: int) -> None:
        """Show a bar, where somebody looks, from step ``first`` on."""
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, initial=first, unit="step")

    @contextmanager
    def step(self, tokens: int, padded: int) -> Iterator[None]:
        """Measure a step over so many tokens and padded places, those of all processes."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.seconds, self.taken, self.done = self.seconds + took, self.taken + took, self.done + 1
        self.tokens, self.padded = self.tokens + tokens, self.padded + padded

    def timing(self, step: int) -> dict[str, Any]:
        """What the steps since the last call took: seconds, tokens a second, share of padding, and MFU on a GPU whose peak is known."""
        out = {
            "step": step,
            "seconds": round(self.seconds, 4),
            **self._speed(),
            "padding": round(self.padded / max(self.tokens + self.padded, 1), 4),
        }
        self.seconds, self.tokens, self.padded = 0.0, 0, 0
        return out

    def tell(self, step: int, loss: float, rate: float) -> None:
        """Say where the training is after ``step`` steps."""
        if rank() != 0:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f} lr {rate:.3g}{self._words()}", refresh=False)
            self.bar.update()
        elif step == self.steps or time.monotonic() - self.told >= QUIET:
            self.told = time.monotonic()
            left = self.taken / self.done * (self.steps - step)
            print(
                f"step {step}/{self.steps} loss {loss:.4f} lr {rate:.3g}{self._words()}, {_duration(left)} left",
                flush=True,
            )

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()

    def _speed(self) -> dict[str, float]:
        speed = self.tokens / max(self.seconds, 1e-9)
        mfu = (
            {}
            if self.peak is None
            else {"mfu": round(FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * speed / (self.peak * world_size()), 4)}
        )
        return {"tokens_per_second": round(speed, 1), **mfu}

    def _words(self) -> str:
        if not self.tokens:
            return ""
        speed = self._speed()
        return f", {speed['tokens_per_second']:,.0f} tokens/s" + (f", MFU {speed['mfu']:.0%}" if "mfu" in speed else "")


def _duration(seconds: float) -> str:
    """``47 s``, ``12 min``, ``3.4 h``."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
