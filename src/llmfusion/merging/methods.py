"""Merge methods as pure functions on one tensor, in one registry.

A method looks at the tensor as often as it needs, block by block, and returns a :class:`Plan`: what makes each block of the merge,
and what is worth reporting. Memory does not grow with the tensor. Arithmetic is float32 in the order of the models, sums and rates
are float64. Options are those of :mod:`llmfusion.study.schema.merging`, defaults left out. On plain arrays: :func:`merge_arrays`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfusion.errors import require
from llmfusion.merging import kernels, ranking
from llmfusion.merging.blocks import BLOCK, Array, Block, PivotDeltas
from llmfusion.merging.selection import Keys, TopKSelection, select
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.merging import RsafMerge

Options = Any  # the options model of the method


@dataclass
class TensorMerge:
    """``merge`` makes a block of the merge ``(c,)`` float32; ``notes`` go into the report, the same keys for every tensor; ``kept`` is the
    share of the deltas' squares that takes part."""

    merge: Callable[[Block], Array]
    notes: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0


Method = Callable[[PivotDeltas, Options], TensorMerge]


def ta(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """Task arithmetic (Ilharco et al. 2023): ``theta + lambda sum_j w_j delta_j``; weight 1/J by default, so the mean.

    ``normalize`` divides by the sum of the weights.
    """
    weights, scale, out = _weights(options, tensor, 1.0 / tensor.models), np.float32(options.scale), _scratch(tensor)

    def merge(block: Block) -> Array:
        kernels.add_weighted(block.theta, block.deltas, weights, scale, out)
        return out[: block.theta.size]

    if options.normalize:
        total = weights.astype(np.float64).sum()
        require(
            total != 0,
            f"weight: {weights.tolist()} have the sum 0, by which normalize: true divides; give other weights, or normalize: false",
        )
        weights = (weights / total).astype(np.float32)
    return TensorMerge(merge)


def ties(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """TIES (Yadav et al. 2023): keep the ``density`` largest |delta| of each model, elect a sign a position, average what agrees.

    ``int(density n)`` values a model, at least one. The sign is that of the weighted sum, + where it is 0. ``normalize`` (default)
    divides by the weights that agree.
    """
    weights = _weights(options, tensor, 1.0)

    def sizes(block: Block, first: bool) -> Array:
        return block.deltas

    count = max(1, int(options.density * tensor.size)) if tensor.size else 0
    tops = select(tensor, sizes, _each(tensor), lambda tops: [count] * tensor.models)
    kept = _share(sum(top.squares[0] for top in tops), tensor)
    notes = {"k": float(count), **{f"threshold_{j}": top.value for j, top in enumerate(tops)}, "kept_energy": kept}
    return TensorMerge(_agreeing(tensor, options, weights, weights, options.normalize, (sizes, tops)), notes, kept)


def sce(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """SCE (Wan et al. 2024, arXiv 2408.07990): select the ``tau`` share of positions by variance over the models (of those where it
    is not 0), coefficients from the selected squares, minority signs erased.

    ``int(tau nonzero)`` positions; with ``tau: 1``, or one model, all.
    """
    tau, key = options.tau, _scratch(tensor, 1)
    if tau >= 1 or tensor.models == 1:
        tensor.survey()
        return _combined(tensor, options, tensor.energies, None, {"k": float(tensor.size), "threshold": 0.0})

    def spreads(block: Block, first: bool) -> Array:
        ranking.spreads(block.deltas, key[0, : block.theta.size])
        return key[:, : block.theta.size]

    (top,) = select(tensor, spreads, [range(tensor.models)], lambda tops: [int(tau * tops[0].nonzero)])
    deviation = top.value / tensor.models**1.5
    return _combined(
        tensor, options, top.squares, (spreads, [top] * tensor.models), {"k": float(top.number), "threshold": deviation}
    )


def rsaf(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """RSAF (InfiFusion, Algorithm 1): select by the rate of change ``r = |delta| / (|theta| + eps)``, a share set by its skewness.

    ``K = tau / (1 + S)`` for skewness ``S >= 0``, else ``tau (1 + |S|)``, at most 1; ``ceil(K n)`` positions a model, at least
    one; zeros are never selected. S is the population skewness in float64, 0 where the rates are constant; with ``rate: log``
    that of ``log r`` where the delta is not 0.
    """
    tau, eps, log = options.tau, options.eps, options.rate == "log"
    by_delta, keys = options.select_by == "delta", _scratch(tensor, tensor.models)
    moments = [Moments() for _ in range(tensor.models)]

    def rates(block: Block, first: bool) -> Array:
        for key, delta, moment in zip(keys[:, : block.theta.size], block.deltas, moments, strict=True):
            if first:
                moment.add(block.theta, delta, eps, key, log)
            if (log or not first) and not by_delta:
                ranking.rates(block.theta, delta, eps, key)
        return block.deltas if by_delta else keys[:, : block.theta.size]

    shares: list[float] = []

    def numbers(tops: Sequence[TopKSelection]) -> list[int]:
        for skewness in (moment.skewness() for moment in moments):
            require(
                math.isfinite(skewness),
                f"eps: {eps} is too small: the skewness of the rates of change overflows; take a larger one",
            )
            shares.append(min(1.0, tau / (1 + skewness) if skewness >= 0 else tau * (1 - skewness)))
        return [
            min(max(1, math.ceil(share * tensor.size)), top.nonzero) for share, top in zip(shares, tops, strict=True)
        ]

    tops = select(tensor, rates, _each(tensor), numbers)
    notes: dict[str, float] = {}
    for j, (moment, share, top) in enumerate(zip(moments, shares, tops, strict=True)):
        notes |= {
            f"S_{j}": moment.skewness(),
            f"K_{j}": share,
            f"k_{j}": float(top.number),
            f"threshold_{j}": top.value,
        }
    return _combined(tensor, options, np.concatenate([top.squares for top in tops]), (rates, tops), notes)


def rsaf_literal(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """RSAF as Algorithm 1 prints it: only the selected values are merged, without a division. Nearly the pivot (docs/methods.md)."""
    return rsaf(
        tensor,
        RsafMerge.model_validate({**dump(options), "method": "rsaf", "select_scope": "values", "normalize": "none"}),
    )


METHODS: dict[str, Method] = {"ta": ta, "ties": ties, "sce": sce, "rsaf": rsaf, "rsaf_literal": rsaf_literal}


def merge_arrays(
    method: str, theta: NDArray[Any], models: Sequence[NDArray[Any]], options: Options, deltas: bool = False
) -> tuple[Array, dict[str, float]]:
    """Merge plain arrays of one shape; with ``deltas`` the models are given minus the pivot. Returns the merge in float32 and the method's notes."""
    tensor = PivotDeltas(np.ravel(theta), [np.ravel(model) for model in models], deltas=deltas)
    plan, out = METHODS[method](tensor, options), np.empty(tensor.size, np.float32)
    for block in tensor.blocks():
        out[block.start : block.start + block.theta.size] = plan.merge(block)
    return out.reshape(np.shape(theta)), plan.notes


class Moments:
    """Skewness of a stream of rates of change: sums centred on the first block's mean, added up in the order of the blocks."""

    def __init__(self) -> None:
        self.count = 0
        self._centre: float | None = None
        self._sums = np.zeros(3)

    def add(self, theta: Array, delta: Array, eps: float, key: Array, log: bool = False) -> None:
        """Take in a block; without ``log``, ``key`` becomes its rates."""

        def sums(centre: float, into: NDArray[np.float64]) -> int:
            if log:
                return ranking.log_moments(theta, delta, eps, centre, into)
            ranking.rates_and_moments(theta, delta, eps, centre, key, into)
            return theta.size

        if self._centre is None:
            first = np.zeros(3)
            count = sums(0.0, first)
            self._centre = float(first[0]) / count if count else None
        if self._centre is not None:
            self.count += sums(self._centre, self._sums)

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
        return (cube - 3 * mean * square + 2 * mean**3) / variance**1.5


# ------------------------------------------------------------------------------------------------ what methods share
Selected = tuple[Keys, Sequence[TopKSelection]]  # one selection a model


def _combined(
    tensor: PivotDeltas,
    options: Options,
    squares: NDArray[np.float64],
    selected: Selected | None,
    notes: dict[str, float],
) -> TensorMerge:
    """Coefficients ``eta_j`` from the selected squares; then the deltas whose sign is the majority's, weighted by them.

    ``select_scope: coefficients`` merges all deltas with these coefficients (FuseChat's code), ``values`` only the selected
    ones (the papers); ``normalize: disjoint`` divides by the coefficients that agree.
    """
    total = float(squares.sum())
    eta = (
        squares / total if total > 0 else np.full(tensor.models, 1 / tensor.models)
    )  # an exact test: small deltas change nothing
    values = options.select_scope == "values"
    energy = _share(total, tensor)
    notes = {**notes, **{f"eta_{j}": float(e) for j, e in enumerate(eta)}, "kept_energy": energy}
    votes, disjoint = np.ones(tensor.models, np.float32), options.normalize == "disjoint"
    return TensorMerge(
        _agreeing(tensor, options, votes, eta.astype(np.float32), disjoint, selected if values else None),
        notes,
        energy if values else 1.0,
    )


def _agreeing(
    tensor: PivotDeltas, options: Options, votes: Array, weights: Array, normalize: bool, selected: Selected | None
) -> Callable[[Block], Array]:
    out, scale = _scratch(tensor), np.float32(options.scale)

    def merge(block: Block) -> Array:
        if selected is not None:
            keys, tops = selected
            found = keys(block, False)
            for j, top in enumerate(tops):
                top.trim(block.start, found[j % len(found)], block.deltas[j])
        kernels.add_agreeing(block.theta, block.deltas, votes, weights, normalize, scale, out)
        return out[: block.theta.size]

    return merge


def _weights(options: Options, tensor: PivotDeltas, default: float) -> Array:
    """``weight`` as one value a model."""
    given = options.weight
    return np.array(np.broadcast_to(np.asarray(default if given is None else given, np.float32), (tensor.models,)))


def _scratch(tensor: PivotDeltas, *rows: int) -> Array:
    return np.empty((*rows, min(BLOCK, tensor.size)), np.float32)


def _each(tensor: PivotDeltas) -> list[range]:
    """A selection for each model alone."""
    return [range(j, j + 1) for j in range(tensor.models)]


def _share(squares: float, tensor: PivotDeltas) -> float:
    energy = float(tensor.energies.sum())
    return squares / energy if energy else 0.0
