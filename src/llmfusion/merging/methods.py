"""Merge methods as pure functions: pivot and deltas of one tensor in, merged tensor out, all in float32.

``theta (n,)`` is the pivot's tensor, ``deltas (J, n)`` are the models minus the pivot. Options are those of
:mod:`llmfusion.config.merging`, defaults left out.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Merged = tuple[Array, dict[str, float]]


def weights_of(options: dict[str, Any], count: int, default: float) -> NDArray[np.float32]:
    """``weight`` as one value a model."""
    given = options.get("weight")
    return np.broadcast_to(np.asarray(default if given is None else given, np.float32), (count,))


def ta(theta: Array, deltas: Array, options: dict[str, Any]) -> Merged:
    """Task arithmetic (Ilharco et al. 2023): ``theta + lambda sum_j w_j delta_j``; weight 1/J by default, so the mean.

    ``normalize`` divides by the sum of the weights.
    """
    weights = weights_of(options, len(deltas), 1.0 / len(deltas))
    total = np.tensordot(weights, deltas, axes=1)  # (n,)
    if options.get("normalize", False):
        total /= weights.sum()
    return theta + np.float32(options.get("lambda", 1.0)) * total, {}


def ties(theta: Array, deltas: Array, options: dict[str, Any]) -> Merged:
    """TIES (Yadav et al. 2023): keep the ``density`` largest |delta| of each model, elect a sign a position, average what agrees.

    The sign is that of the weighted sum, +1 where it is 0. ``normalize`` (default) divides by the weights that agree.
    """
    weights = weights_of(options, len(deltas), 1.0)[:, None]
    count = max(1, int(options.get("density", 0.6) * theta.size)) if theta.size else 0
    kept = np.stack([np.where(top(np.abs(d), count), d, np.float32(0)) for d in deltas])  # (J, n)
    agree = agreeing(kept, (weights * kept).sum(0))
    total, share = (weights * kept * agree).sum(0), (weights * agree).sum(0)
    if options.get("normalize", True):
        total /= np.where(share == 0, np.float32(1), share)
    energy = float((deltas.astype(np.float64) ** 2).sum())
    notes = {"k": float(count), "kept_energy": float((kept.astype(np.float64) ** 2).sum()) / energy if energy else 0.0}
    return theta + np.float32(options.get("lambda", 1.0)) * total, notes


def sce(theta: Array, deltas: Array, options: dict[str, Any]) -> Merged:
    """SCE (Wan et al. 2024, arXiv 2408.07990): select the ``tau`` share of positions by variance over the models (of those
    where it is not 0), coefficients from the selected squares, minority signs erased."""
    variance = deltas.astype(np.float64).var(axis=0)  # (n,)
    count = int(options.get("tau", 0.1) * np.count_nonzero(variance))
    selected = top(variance, count) if count else np.zeros(theta.shape, bool)
    masks = np.broadcast_to(selected if len(deltas) > 1 else np.ones(theta.shape, bool), deltas.shape)
    merged, notes = _combine(theta, deltas, masks, options)
    return merged, {"k": float(masks[0].sum()), **notes}


def rsaf(theta: Array, deltas: Array, options: dict[str, Any]) -> Merged:
    """RSAF (InfiFusion, Algorithm 1): select by the rate of change ``r = |delta| / (|theta| + eps)``, a share set by its skewness.

    ``K = tau / (1 + S)`` for skewness ``S >= 0``, else ``tau (1 + |S|)``, at most 1; ``ceil(K n)`` positions a model, at least
    one; zeros are never selected. S is the population skewness in float64, 0 where the rates are constant.
    """
    tau, eps = options.get("tau", 0.1), options.get("eps", 1e-8)
    masks: list[NDArray[np.bool_]] = []
    notes: dict[str, float] = {}
    for j, delta in enumerate(deltas):
        size = np.abs(delta).astype(np.float64)
        rate = size / (np.abs(theta).astype(np.float64) + eps)
        s = skewness(rate)
        share = min(1.0, tau / (1 + s) if s >= 0 else tau * (1 + abs(s)))
        count = max(1, math.ceil(share * delta.size)) if delta.size else 0
        mask = top(rate if options.get("select_by", "rate") == "rate" else size, count) & (delta != 0)
        masks.append(mask)
        notes |= {f"S_{j}": s, f"K_{j}": share, f"k_{j}": int(mask.sum())}
    merged, more = _combine(theta, deltas, np.stack(masks), options)
    return merged, {**notes, **more}


def _combine(theta: Array, deltas: Array, masks: NDArray[np.bool_], options: dict[str, Any]) -> Merged:
    """Coefficients ``eta_j`` from the selected squares; then the deltas whose sign is the majority's, weighted by them.

    ``select_scope: coefficients`` merges all deltas with these coefficients (FuseChat's code), ``values`` only the selected
    ones (the papers); ``normalize: disjoint`` divides by the coefficients that agree.
    """
    squares = (np.where(masks, deltas, np.float32(0)).astype(np.float64) ** 2).sum(1)  # (J,)
    total = squares.sum()
    eta = squares / total if total > 0 else np.full(len(deltas), 1 / len(deltas))  # an exact test: small deltas change nothing
    used = np.where(masks, deltas, np.float32(0)) if options.get("select_scope", "coefficients") == "values" else deltas
    agree = agreeing(used, used.sum(0))
    weights = eta.astype(np.float32)[:, None]
    merged, share = (weights * used * agree).sum(0), (weights * agree).sum(0)
    if options.get("normalize", "disjoint") == "disjoint":
        merged /= np.where(share == 0, np.float32(1), share)
    energy = (deltas.astype(np.float64) ** 2).sum()
    notes = {f"eta_{j}": float(e) for j, e in enumerate(eta)} | {"kept_energy": float(total / energy) if energy else 0.0}
    return theta + merged, notes


def top(values: NDArray, count: int) -> NDArray[np.bool_]:
    """Mask of exactly ``count`` largest values; of equal ones at the threshold those with the lower index."""
    if count >= values.size:
        return np.ones(values.shape, bool)
    threshold = np.partition(values, values.size - count)[values.size - count]
    mask = values > threshold
    equal = np.flatnonzero(values == threshold)
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def agreeing(deltas: Array, total: Array) -> NDArray[np.bool_]:
    """``(J, n)``: which deltas have the elected sign, that of ``total``; + where it is 0. Zeros agree with nothing."""
    return np.sign(deltas) == np.where(total >= 0, np.float32(1), np.float32(-1))


def skewness(values: NDArray[np.float64]) -> float:
    """Population (Fisher) skewness ``m3 / m2^1.5`` in float64; 0 where the variance is 0."""
    if values.size == 0:
        return 0.0
    centred = values - values.mean()
    variance = float((centred**2).mean())
    spread = variance**1.5
    # rounding leaves a variance of about (1e-16 mean)^2 behind constants
    return float((centred**3).mean()) / spread if variance > (1e-14 * float(np.abs(values).max())) ** 2 and spread > 0 else 0.0


METHODS: dict[str, Callable[[Array, Array, dict[str, Any]], Merged]] = {"ta": ta, "ties": ties, "sce": sce, "rsaf": rsaf}
