"""The exactly k largest values of a stream, of equal ones those that come first, without ever holding the stream.

Values are ordered by size, whatever their sign: without its sign, the bits of a float32 order as the number's size
does. One pass counts the upper 16 bits in a histogram; a second one resolves the bin in which the k-th value lies by
the lower 16, which gives the threshold exactly; a third one, only where more values equal the threshold than are
wanted, finds the position of the last of them.
"""

from collections.abc import Callable, Sequence

from llmfusion.io.lazy import np
from llmfusion.merging.blocks import BLOCK, Array, Block, PivotDeltas
from llmfusion.merging.lazy import ranking

NOTHING_SELECTED = 0xFFFFFFFF  # a threshold above every key

SortKeys = Callable[[Block, bool], Array]
"""``(block, whether in the first pass) -> (M, c)``: what M selections order by, whatever its sign."""


class TopKSelection:
    """One selection, made in two or three passes.

    Afterwards ``threshold`` (a key's bits), ``end`` (keys equal to it are selected before this position), ``count``
    (how many are selected) and ``squares (len(models),)``, the sums of the selected deltas' squares for ``models``.
    ``nonzero`` is known after the first pass.
    """

    def __init__(self, models: range, size: int):
        self.models = models
        self.end = size
        self.nonzero = 0
        self.count = 0
        self.threshold = NOTHING_SELECTED
        self.squares = np.zeros(len(models))
        self._coarse = np.zeros(1 << 15, np.int64)  # histogram of the upper 16 bits, without the sign
        self._fine = np.zeros(1 << 16, np.int64)  # histogram of the lower 16 bits in one bin of the other
        self._fine_squares = np.zeros((len(models), 1 << 16))
        self._places = np.empty(min(size, BLOCK), np.int32)
        self._bin = -1
        self._wanted_of_bin = 0
        self._wanted_of_equal = 0

    @property
    def value(self) -> float:
        """The threshold as a number: the smallest selected key; infinity where nothing is selected."""
        if self.threshold == NOTHING_SELECTED:
            return float("inf")
        return float(np.uint32(self.threshold).view(np.float32))

    def add_to_histogram(self, keys: Array) -> None:
        """First pass."""
        self.nonzero += ranking.count_coarse(keys, self._coarse)

    def set_count(self, count: int) -> None:
        """Between the first and the second pass: how many to select."""
        self.count = count
        if count:
            self._bin, self._wanted_of_bin = ranking.bin_of(self._coarse, count)

    def refine(self, keys: Array, deltas: Array) -> None:
        """Second pass."""
        if self._bin >= 0:
            rows = deltas[self.models.start : self.models.stop]
            self.squares += ranking.count_fine(
                keys, np.uint32(self._bin), rows, self._fine, self._fine_squares, self._places
            )

    def resolve(self) -> bool:
        """After the second pass; True if a third one is needed."""
        if self._bin < 0:
            return False
        low, self._wanted_of_equal = ranking.bin_of(self._fine, self._wanted_of_bin)
        self.threshold = self._bin << 16 | low
        self.squares += self._fine_squares[:, low + 1 :].sum(axis=1)
        if self._wanted_of_equal == self._fine[low]:
            self.squares += self._fine_squares[:, low]
            self._wanted_of_equal = 0
        return self._wanted_of_equal > 0

    def locate(self, start: int, keys: Array, deltas: Array) -> bool:
        """Third pass; True once the last selected value has been found."""
        if self._wanted_of_equal:
            threshold = np.uint32(self.threshold)
            end, count = ranking.locate(keys, threshold, self._wanted_of_equal)
            for m, j in enumerate(self.models):
                self.squares[m] += ranking.squares_tied(keys, threshold, end, deltas[j])
            self._wanted_of_equal -= count
            self.end = start + end
        return not self._wanted_of_equal

    def zero_unselected(self, start: int, keys: Array, delta: Array) -> None:
        """Set what is not selected to 0, in place."""
        ranking.trim(keys, np.uint32(self.threshold), min(max(self.end - start, 0), keys.size), delta)


def select(
    tensor: PivotDeltas,
    sort_keys: SortKeys,
    models: Sequence[range],
    choose_counts: Callable[[Sequence[TopKSelection]], Sequence[int]],
) -> list[TopKSelection]:
    """Selections by M keys.

    ``models[m]`` says whose squares selection m sums; ``choose_counts`` is called after the first pass and returns how
    many values each selection takes.
    """
    selections = [TopKSelection(of, tensor.size) for of in models]
    for block in tensor.blocks():
        for selection, keys in zip(selections, sort_keys(block, True), strict=True):
            selection.add_to_histogram(keys)
    for selection, count in zip(selections, choose_counts(selections), strict=True):
        selection.set_count(count)
    for block in tensor.blocks():
        for selection, keys in zip(selections, sort_keys(block, False), strict=True):
            selection.refine(keys, block.deltas)
    ambiguous = [selection.resolve() for selection in selections]
    if any(ambiguous):
        _locate_ends(tensor, sort_keys, selections)
    return selections


def select_per_model(
    tensor: PivotDeltas, sort_keys: SortKeys, choose_counts: Callable[[Sequence[TopKSelection]], Sequence[int]]
) -> list[TopKSelection]:
    """A selection for each model alone, by a row of keys each."""
    return select(tensor, sort_keys, [range(j, j + 1) for j in range(tensor.models)], choose_counts)


def _locate_ends(tensor: PivotDeltas, sort_keys: SortKeys, selections: Sequence[TopKSelection]) -> None:
    """The third pass, up to the block with the last value that is selected."""
    for block in tensor.blocks():
        rows = sort_keys(block, False)  # (M, c)
        located = [s.locate(block.start, keys, block.deltas) for s, keys in zip(selections, rows, strict=True)]
        if all(located):
            return
