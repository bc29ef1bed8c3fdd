"""What a merge method works on: one tensor of a pivot and of the models fine-tuned from it, in blocks that fit a
processor's cache.

Imported by every method, so numpy and the compiled loops are imported when they are first used.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmfusion.errors import UserError
from llmfusion.io.digests import digest
from llmfusion.io.lazy import np
from llmfusion.merging.lazy import kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    FloatArray = NDArray[np.float64]
else:  # names for annotations, without importing numpy
    Array = FloatArray = Any

BLOCK = 32768  # values; a pivot and four models take 640 KiB
LARGEST_FINITE = 0x7F7FFFFF  # bits of the largest finite float32
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")


@dataclass
class Block:
    """Some values of a tensor: where they begin, the pivot's ``theta (c,)`` and ``deltas (J, c)``, model minus pivot.

    The arrays are scratch: valid until the next block, and free to be overwritten.
    """

    start: int
    theta: Array
    deltas: Array


@dataclass
class TensorMerge:
    """How one tensor is merged.

    ``merge_block`` makes a block of the merge, ``(c,)`` float32. ``notes`` go into the report, the same keys for every
    tensor. ``kept`` is the share of the deltas' squares that takes part.
    """

    merge_block: Callable[[Block], Array]
    notes: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None for one outside the layers.

    As in ``model.layers.12.mlp.up_proj.weight``, ``h.3.ln_1.weight`` and ``gpt_neox.layers.3.attention.dense.weight``.
    """
    match = LAYER.search(name)
    return int(match[1]) if match else None


def count_layers(names: Iterable[str]) -> int:
    """How many layers a model with tensors of these names has; 0 where no name has a layer's number."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


class PivotDeltas:
    """A flat tensor ``theta (n,)`` and the same one of J models; float32, float16, or bfloat16 as uint16 bits, also
    memory-mapped.

    With ``deltas`` the models are given as their differences from the pivot, in float32. ``labels`` name pivot and
    models in messages. ``name`` is the tensor's in the pivot, ``shape`` the one it is merged with (``(n,)`` by
    default), ``layers`` the number of layers of the model; ``layer`` and ``seed`` follow from the name.

    The first pass through :meth:`blocks` fills ``energies (J,)`` (sums of squares of the deltas), ``nonzero (J,)`` and
    ``conflicts`` (positions where both signs occur), and raises :class:`UserError` where a value is not finite.
    """

    def __init__(
        self,
        theta: "NDArray[Any]",
        models: Sequence["NDArray[Any]"],
        labels: Sequence[str] | None = None,
        deltas: bool = False,
        *,
        name: str = "",
        shape: tuple[int, ...] | None = None,
        layers: int = 0,
    ):
        self.name = name
        self.layer = layer_of(name)
        self.layers = layers
        self.size = theta.size
        self.shape = (theta.size,) if shape is None else shape
        self.models = len(models)
        self.labels = labels or ["the pivot's tensor", *(f"the tensor of model {j}" for j in range(self.models))]
        self.energies = np.zeros(self.models)
        self.nonzero = np.zeros(self.models, np.int64)
        self.conflicts = 0
        self._theta = as_read_only(theta)
        self._models = [as_read_only(model) for model in models]
        self._models_are_deltas = deltas
        self._surveyed = False
        self._theta_scratch = self.scratch()
        self._delta_scratch = self.scratch(self.models)

    @cached_property
    def seed(self) -> int:
        """64 bits that follow from the tensor's name, for ``np.random.default_rng([options.seed, seed])``."""
        return int(digest(self.name)[:16], 16)

    def scratch(self, *rows: int) -> Array:
        """Uninitialised float32 memory as wide as a block, ``(*rows, c)``."""
        return np.empty((*rows, min(BLOCK, self.size)), np.float32)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        for start in range(0, self.size, BLOCK):
            block = self._read_block(start, min(start + BLOCK, self.size))
            if not self._surveyed:
                self._survey_block(block)
            yield block
        self._surveyed = True

    def survey(self) -> None:
        """Pass through the tensor once, to fill what the first pass fills."""
        if not self._surveyed:
            for _ in self.blocks():
                pass

    def _read_block(self, start: int, end: int) -> Block:
        count = end - start
        theta = self._theta_scratch[:count]
        whole = count == self._delta_scratch.shape[1]
        deltas = self._delta_scratch if whole else np.empty((self.models, count), np.float32)  # (J, c), contiguous
        _read(self._theta[start:end], theta)
        for model, delta in zip(self._models, deltas, strict=True):
            if self._models_are_deltas:
                _read(model[start:end], delta)
            else:
                _subtract(model[start:end], theta, delta)
        return Block(start, theta, deltas)

    def _survey_block(self, block: Block) -> None:
        if self.models:
            largest, conflicts = kernels.survey(block.deltas, self.energies, self.nonzero)
            self.conflicts += conflicts
        else:
            largest = kernels.magnitude(block.theta)
        if largest > LARGEST_FINITE:  # a delta from what is not finite is not finite
            self._refuse(block.start, block.start + block.theta.size)

    def _refuse(self, start: int, end: int) -> None:
        """Raise :class:`UserError` for a block with a delta that is not finite; names the file whose value it is."""
        for label, values in zip(self.labels, (self._theta, *self._models), strict=True):
            widened = np.empty(end - start, np.float32)
            _read(values[start:end], widened)
            if not np.isfinite(widened).all():
                raise UserError(f"{label} holds a NaN or an infinity")
        raise UserError(f"{self.labels[0]}: the difference to a model overflows float32")


def _read(values: "NDArray[Any]", out: Array) -> None:
    """Stored values as float32; uint16 are the bits of bfloat16."""
    if values.dtype == np.uint16:
        kernels.widen(values, out)
    else:
        np.copyto(out, values)


def _subtract(values: "NDArray[Any]", theta: Array, out: Array) -> None:
    """Stored values minus the pivot's, in float32."""
    if values.dtype == np.uint16:
        kernels.widen_difference(values, theta, out)
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # reported as an error of the file
            np.subtract(values, theta, out=out, dtype=np.float32)


class Rounding:
    """Rounds at most ``count`` values at a time to a safetensors dtype, to the nearest, ties to even.

    Returns the values as stored, and widened again to float32. Both are valid until the next block; fresh memory for
    each would cost more than the rounding.
    """

    def __init__(self, dtype: str, count: int):
        self.dtype = dtype
        self.content = np.empty(count, np.float16 if dtype == "F16" else np.uint16)
        self.widened = np.empty(count, np.float32)

    def __call__(self, values: Array) -> tuple["NDArray[Any]", Array]:
        if self.dtype == "F32":
            return values, values
        content = self.content[: values.size]
        widened = self.widened[: values.size]
        if self.dtype == "F16":
            with np.errstate(over="ignore"):
                np.copyto(content, values, casting="same_kind")
            np.copyto(widened, content)
        else:
            kernels.narrow(values, content)
            kernels.widen(as_read_only(content), widened)
        return content, widened


def as_read_only(values: "NDArray[Any]") -> "NDArray[Any]":
    """As a plain array that is read only and aligned, the one kind the kernels are compiled for.

    A file's header may leave tensors at odd addresses; then the values are copied.
    """
    view = np.asarray(values).view() if values.flags.aligned or values.dtype != np.uint16 else values.copy()
    view.flags.writeable = False
    return view
