"""One tensor of a pivot and of the models fine-tuned from it, handed out in float32 blocks that fit a processor's cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfusion.errors import UserError
from llmfusion.merging import kernels

BLOCK = 32768  # values; a pivot and four models take 640 KiB
FINITE = 0x7F7FFFFF  # bits of the largest finite float32
Array = NDArray[np.float32]


@dataclass
class Block:
    """Some values of a tensor: where they begin, the pivot's ``theta (c,)`` and ``deltas (J, c)``, model minus pivot.

    The arrays are scratch: valid until the next block, and free to be overwritten.
    """

    start: int
    theta: Array
    deltas: Array


class PivotDeltas:
    """A flat tensor ``theta (n,)`` and the same one of J models; float32, float16, or bfloat16 as uint16 bits, also memory-mapped.

    With ``deltas`` the models are given as their differences from the pivot, in float32. ``labels`` name pivot and models in messages.
    The first pass through :meth:`blocks` fills ``energies (J,)`` (sums of squares of the deltas), ``nonzero (J,)`` and ``conflicts``
    (positions where both signs occur), and raises :class:`UserError` where a value is not finite.
    """

    def __init__(
        self,
        theta: NDArray[Any],
        models: Sequence[NDArray[Any]],
        labels: Sequence[str] | None = None,
        deltas: bool = False,
    ):
        self.size, self.models = theta.size, len(models)
        self.labels = labels or ["the pivot's tensor", *(f"the tensor of model {j}" for j in range(self.models))]
        self.energies = np.zeros(self.models)
        self.nonzero = np.zeros(self.models, np.int64)
        self.conflicts = 0
        self._theta, self._models, self._given_deltas = frozen(theta), [frozen(model) for model in models], deltas
        self._surveyed = False
        width = min(BLOCK, self.size)
        self._values, self._deltas = np.empty(width, np.float32), np.empty((self.models, width), np.float32)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        for start in range(0, self.size, BLOCK):
            end = min(start + BLOCK, self.size)
            theta = self._values[: end - start]
            deltas = (
                self._deltas
                if end - start == self._deltas.shape[1]
                else np.empty((self.models, end - start), np.float32)
            )
            _read(self._theta[start:end], theta)
            for source, delta in zip(self._models, deltas, strict=True):
                _read(source[start:end], delta) if self._given_deltas else _difference(source[start:end], theta, delta)
            if not self._surveyed:
                self._survey(start, theta, deltas)
            yield Block(start, theta, deltas)
        self._surveyed = True

    def survey(self) -> None:
        """Pass through the tensor once, for what the first pass finds out."""
        if not self._surveyed:
            for _ in self.blocks():
                pass

    def _survey(self, start: int, theta: Array, deltas: Array) -> None:
        if self.models:
            largest, conflicts = kernels.survey(deltas, self.energies, self.nonzero)
            self.conflicts += conflicts
        else:
            largest = kernels.magnitude(theta)
        if largest > FINITE:  # a delta from what is not finite is not finite
            self._refuse(start, start + theta.size)

    def _refuse(self, start: int, end: int) -> None:
        """Raise :class:`UserError` for a block with a delta that is not finite: whose fault it is."""
        for label, source in zip(self.labels, (self._theta, *self._models), strict=True):
            values = np.empty(end - start, np.float32)
            _read(source[start:end], values)
            if not np.isfinite(values).all():
                raise UserError(f"{label} holds a NaN or an infinity")
        raise UserError(f"{self.labels[0]}: the difference to a model overflows float32")


def _read(source: NDArray[Any], out: Array) -> None:
    if source.dtype == np.uint16:
        kernels.widen(source, out)
    else:
        np.copyto(out, source)


def _difference(source: NDArray[Any], theta: Array, out: Array) -> None:
    if source.dtype == np.uint16:
        kernels.widen_difference(source, theta, out)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # told as an error of the file
            np.subtract(source, theta, out=out, dtype=np.float32)


class Rounding:
    """Rounds at most ``count`` values at a time to a safetensors dtype, to the nearest, ties to even: as stored, and widened again to
    float32. What it returns is valid until the next block; fresh memory for each would cost more than the rounding."""

    def __init__(self, dtype: str, count: int):
        self.dtype = dtype
        self.content = np.empty(count, np.float16 if dtype == "F16" else np.uint16)
        self.widened = np.empty(count, np.float32)

    def __call__(self, values: Array) -> tuple[NDArray[Any], Array]:
        if self.dtype == "F32":
            return values, values
        content, widened = self.content[: values.size], self.widened[: values.size]
        if self.dtype == "F16":
            with np.errstate(over="ignore"):
                np.copyto(content, values, casting="same_kind")
            np.copyto(widened, content)
        else:
            kernels.narrow(values, content)
            kernels.widen(frozen(content), widened)
        return content, widened


def frozen(values: NDArray[Any]) -> NDArray[Any]:
    """As a plain array that is read only and aligned (a file's header may leave tensors at odd addresses): kernels are compiled for one kind."""
    view = np.asarray(values).view() if values.flags.aligned or values.dtype != np.uint16 else values.copy()
    view.flags.writeable = False
    return view
