# mypy: disable-error-code="assignment"
"""Reading, merging and writing a block (see :mod:`llmfusion.merging.compiled`)."""

import numpy as np

from llmfusion.merging.compiled import LANES, SIZE, TILE, compiled, squares, total_of


# ------------------------------------------------------------------------------------------------ reading
@compiled
def widen(bits, out):
    """bfloat16 bits (n,) uint16 to float32 (n,): exact."""
    for i in range(bits.size):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)


@compiled
def widen_difference(bits, theta, out):
    """``out = phi - theta`` in float32 for phi in bfloat16 bits."""
    for i in range(bits.size):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32) - theta[i]


@compiled
def magnitude(values):
    """The largest absolute value as float32 bits; above 0x7F7FFFFF there is an infinity or a NaN."""
    view = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(values.size):
        largest = max(largest, np.uint32(view[i] & SIZE))
    return largest


@compiled
def survey(deltas, energies, nonzero):
    """Add each model's sum of squares and number of values that are not 0 to ``energies`` and ``nonzero (J,)``.

    Returns the largest absolute value of ``deltas (J, n)`` as float32 bits, and at how many positions both signs occur.
    """
    models, n = deltas.shape
    largest = np.uint32(0)
    conflicts = 0
    signs = np.empty(TILE, np.uint32)
    for j in range(models):
        energies[j] += squares(deltas[j])
    for start in range(0, n, TILE):
        seen = signs[: min(TILE, n - start)]
        seen[:] = np.uint32(0)
        for j in range(models):
            bits = deltas[j, start : start + TILE].view(np.uint32)
            count = np.int32(0)
            for i in range(bits.size):
                size = np.uint32(bits[i] & SIZE)
                largest = max(largest, size)
                some = np.uint32(size != np.uint32(0))
                count = np.int32(count + np.int32(some))
                seen[i] = np.uint32(seen[i] | np.uint32(some << np.uint32(bits[i] >> np.uint32(31))))
            nonzero[j] += count
        count = np.int32(0)
        for i in range(seen.size):
            count = np.int32(count + np.int32(seen[i] == np.uint32(3)))
        conflicts += count
    return largest, conflicts


# ------------------------------------------------------------------------------------------------ merging
@compiled
def add_weighted(theta, deltas, weights, scale, out):
    """``theta + scale sum_j weights_j deltas_j``, in float32, models in order."""
    models, n = deltas.shape
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        pivot = theta[start:end]
        merged = out[start:end]
        merged[:] = np.float32(0)
        for j in range(models):
            row = deltas[j, start:end]
            weight = weights[j]
            for i in range(row.size):
                merged[i] += weight * row[i]
        for i in range(pivot.size):
            merged[i] = pivot[i] + scale * merged[i]


@compiled
def add_agreeing(theta, deltas, votes, weights, normalize, scale, out):
    """Elect a sign a position, and add the weighted deltas that have it to the pivot.

    The sign is that of ``sum_j votes_j deltas_j``, + where it is 0. ``theta + scale sum_j weights_j deltas_j`` over the
    models whose ``votes_j deltas_j`` has that sign, divided by the sum of their weights if ``normalize`` (and that is
    not 0). float32, models in order.
    """
    models, n = deltas.shape
    vote = np.empty(TILE, np.float32)
    total = np.empty(TILE, np.float32)
    share = np.empty(TILE, np.float32)
    zero = np.float32(0)
    one = np.float32(1)
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        pivot = theta[start:end]
        merged = out[start:end]
        vote[:] = zero
        total[:] = zero
        share[:] = zero
        for j in range(models):
            row = deltas[j, start:end]
            own = votes[j]
            for i in range(row.size):
                vote[i] += own * row[i]
        for j in range(models):
            row = deltas[j, start:end]
            own = votes[j]
            weight = weights[j]
            for i in range(row.size):
                cast = own * row[i]
                agrees = (cast > zero) if vote[i] >= zero else (cast < zero)
                total[i] += weight * row[i] if agrees else zero
                share[i] += weight if agrees else zero
        for i in range(pivot.size):
            divisor = share[i] if normalize and share[i] != zero else one
            merged[i] = pivot[i] + scale * (total[i] / divisor)


# ------------------------------------------------------------------------------------------------ writing
@compiled
def narrow(values, out):
    """float32 (n,) to bfloat16 bits (n,) uint16, to the nearest, ties to even. For finite values."""
    view = values.view(np.uint32)
    for i in range(values.size):
        bits = view[i]
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def moved(merged, theta):
    """How many values differ from the pivot's, and the sum of squares of the differences."""
    lanes = np.zeros(LANES)
    count = np.int32(0)
    n = merged.size
    for start in range(0, n, LANES):
        new = merged[start : start + LANES]
        old = theta[start : start + LANES]
        for k in range(new.size):
            value = np.float64(new[k]) - np.float64(old[k])
            lanes[k] += value * value
    for i in range(n):
        count = np.int32(count + np.int32(merged[i] != theta[i]))
    return count, total_of(lanes)
