"""The exactly k largest values of a stream, of equal ones those that come first, without ever holding the stream.

Without its sign, the bits of a float32 order as the number's size does, by which values are ordered here. One pass counts the upper 16 bits in a histogram; a second one
resolves the bin in which the k-th value lies by the lower 16, which gives the threshold exactly; a third one, only where more values
equal the threshold than are wanted, finds the position of the last one that is.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llmfusion.merging import ranking
from llmfusion.merging.blocks import BLOCK, Array, Block, PivotDeltas

NEVER = 0xFFFFFFFF  # a threshold above every key

Keys = Callable[
    [Block, bool], Array
]  # block, whether in the first pass -> (M, c): what M selections order by, whatever its sign


class TopKSelection:
    """One selection. Afterwards ``threshold`` (a key's bits), ``end`` (keys equal to it count before this position), ``number``
    (how many are selected) and ``squares (len(models),)``, the sums of the selected deltas' squares for ``models``."""

    def __init__(self, models: range, size: int):
        self.models, self.end = models, size
        self.nonzero, self.number, self.threshold = 0, 0, NEVER
        self.squares = np.zeros(len(models))
        self._coarse = np.zeros(1 << 15, np.int64)
        self._fine, self._sums = np.zeros(1 << 16, np.int64), np.zeros((len(models), 1 << 16))
        self._places = np.empty(min(size, BLOCK), np.int32)
        self._bin, self._rest, self._wanted = -1, 0, 0

    @property
    def value(self) -> float:
        """The threshold as a number: the smallest selected key; infinity where nothing is selected."""
        return float(np.uint32(self.threshold).view(np.float32)) if self.threshold != NEVER else float("inf")

    def count(self, key: Array) -> None:
        """First pass."""
        self.nonzero += ranking.count_coarse(key, self._coarse)

    def choose(self, number: int) -> None:
        """Between the first and the second pass: how many to select."""
        self.number = number
        if number:
            self._bin, self._rest = ranking.bin_of(self._coarse, number)

    def refine(self, key: Array, deltas: Array) -> None:
        """Second pass."""
        if self._bin >= 0:
            rows = deltas[self.models.start : self.models.stop]
            self.squares += ranking.count_fine(key, np.uint32(self._bin), rows, self._fine, self._sums, self._places)

    def resolve(self) -> bool:
        """After the second pass; True if a third one is needed."""
        if self._bin < 0:
            return False
        low, self._wanted = ranking.bin_of(self._fine, self._rest)
        self.threshold = self._bin << 16 | low
        self.squares += self._sums[:, low + 1 :].sum(axis=1)
        if self._wanted == self._fine[low]:
            self.squares += self._sums[:, low]
            self._wanted = 0
        return self._wanted > 0

    def locate(self, start: int, key: Array, deltas: Array) -> bool:
        """Third pass; True once the last selected value has been found."""
        if self._wanted:
            end, found = ranking.locate(key, np.uint32(self.threshold), self._wanted)
            for m, j in enumerate(self.models):
                self.squares[m] += ranking.squares_tied(key, np.uint32(self.threshold), end, deltas[j])
            self._wanted -= found
            self.end = start + end
        return not self._wanted

    def trim(self, start: int, key: Array, delta: Array) -> None:
        """Set what is not selected to 0, in place."""
        ranking.trim(key, np.uint32(self.threshold), min(max(self.end - start, 0), key.size), delta)


def select(
    tensor: PivotDeltas,
    keys: Keys,
    models: Sequence[range],
    numbers: Callable[[Sequence[TopKSelection]], Sequence[int]],
) -> list[TopKSelection]:
    """Selections by M keys; ``models[m]`` says whose squares selection m sums, ``numbers`` after the first pass how many each takes."""
    tops = [TopKSelection(of, tensor.size) for of in models]
    for block in tensor.blocks():
        for top, key in zip(tops, keys(block, True), strict=True):
            top.count(key)
    for top, number in zip(tops, numbers(tops), strict=True):
        top.choose(number)
    for block in tensor.blocks():
        for top, key in zip(tops, keys(block, False), strict=True):
            top.refine(key, block.deltas)
    tied = [top.resolve() for top in tops]
    if any(tied):
        for block in tensor.blocks():
            located = [
                top.locate(block.start, key, block.deltas) for top, key in zip(tops, keys(block, False), strict=True)
            ]
            if all(located):
                break
    return tops
