"""RSAF's selection by the rate of change ``r = |delta| / (|theta| + eps)`` (arXiv 2501.02795, Algorithm 1)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from llmfusion.errors import require
from llmfusion.io.lazy import np
from llmfusion.merging.blocks import Array, Block, FloatArray, PivotDeltas
from llmfusion.merging.lazy import ranking
from llmfusion.merging.selection import TopKSelection, select_per_model
from llmfusion.merging.sign_consensus import SelectedDeltas


class Moments:
    """Skewness of a stream of rates of change.

    From sums centred on the first block's mean, added up in the order of the blocks.
    """

    def __init__(self) -> None:
        self.count = 0
        self._centre: float | None = None
        self._sums = np.zeros(3)

    def add(self, theta: Array, delta: Array, eps: float, keys: Array, log: bool = False) -> None:
        """Take in a block; without ``log``, ``keys`` becomes its rates."""

        def add_powers(centre: float, sums: FloatArray) -> int:
            if log:
                return int(ranking.log_moments(theta, delta, eps, centre, sums))
            ranking.rates_and_moments(theta, delta, eps, centre, keys, sums)
            return theta.size

        if self._centre is None:
            first = np.zeros(3)
            count = add_powers(0.0, first)
            self._centre = float(first[0]) / count if count else None
        if self._centre is not None:
            self.count += add_powers(self._centre, self._sums)

    def skewness(self) -> float:
        """Population (Fisher) skewness ``m3 / m2^1.5``; 0 where the variance is 0, NaN where a cube overflows."""
        if not self.count:
            return 0.0
        if not np.isfinite(self._sums).all():
            return math.nan
        mean, square, cube = (float(s) / self.count for s in self._sums)
        variance = square - mean**2
        # rounding leaves a variance of about (1e-16 mean)^2 behind constants
        if variance <= (1e-14 * abs((self._centre or 0.0) + mean)) ** 2 or variance**1.5 == 0:
            return 0.0
        return float((cube - 3 * mean * square + 2 * mean**3) / variance**1.5)


class RateSelection:
    """A selection a model, of a share that the skewness of its rates sets.

    ``selected`` are the deltas, ``squares (J,)`` the sums of their squares, and ``notes`` what the report says of each
    model.

    ``K = tau / (1 + S)`` for skewness ``S >= 0``, else ``tau (1 + |S|)``, at most 1; ``ceil(K n)`` positions a model,
    at least one; zeros are never selected. S is the population skewness in float64, 0 where the rates are constant;
    with ``rate: log`` that of ``log r`` where the delta is not 0. Raises :class:`UserError` for an ``eps`` so small
    that cubes of rates overflow.
    """

    def __init__(
        self,
        tensor: PivotDeltas,
        tau: float,
        eps: float,
        rate: Literal["relative", "log"],
        select_by: Literal["rate", "delta"],
    ):
        moments = [Moments() for _ in range(tensor.models)]
        sort_keys = _sort_keys(tensor, moments, eps, rate == "log", select_by == "delta")
        shares: list[float] = []

        def choose_counts(selections: Sequence[TopKSelection]) -> list[int]:
            shares.extend(_share(moment.skewness(), tau, eps) for moment in moments)
            wanted = [max(1, math.ceil(share * tensor.size)) for share in shares]
            return [min(count, selection.nonzero) for count, selection in zip(wanted, selections, strict=True)]

        selections = select_per_model(tensor, sort_keys, choose_counts)
        self.selected = SelectedDeltas(sort_keys, selections)
        self.squares: FloatArray = np.concatenate([selection.squares for selection in selections])  # (J,)
        self.notes: dict[str, float] = {}
        for j, (moment, share, selection) in enumerate(zip(moments, shares, selections, strict=True)):
            self.notes[f"S_{j}"] = moment.skewness()
            self.notes[f"K_{j}"] = share
            self.notes[f"k_{j}"] = float(selection.count)
            self.notes[f"threshold_{j}"] = selection.value


def _sort_keys(
    tensor: PivotDeltas, moments: Sequence[Moments], eps: float, log: bool, by_delta: bool
) -> Callable[[Block, bool], Array]:
    """The keys of the selection; the first pass also takes the moments of the rates."""
    scratch = tensor.scratch(tensor.models)  # (J, c)

    def sort_keys(block: Block, first_pass: bool) -> Array:
        rows = scratch[:, : block.theta.size]
        for keys, delta, moment in zip(rows, block.deltas, moments, strict=True):
            if first_pass:
                moment.add(block.theta, delta, eps, keys, log)
            if (log or not first_pass) and not by_delta:
                ranking.rates(block.theta, delta, eps, keys)
        return block.deltas if by_delta else rows

    return sort_keys


def _share(skewness: float, tau: float, eps: float) -> float:
    """The share of a model's positions that is selected."""
    require(
        math.isfinite(skewness),
        f"eps: {eps} is too small: the skewness of the rates of change overflows; take a larger one",
    )
    return min(1.0, tau / (1 + skewness) if skewness >= 0 else tau * (1 - skewness))
