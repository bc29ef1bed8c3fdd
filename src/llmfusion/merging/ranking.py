# mypy: disable-error-code="assignment"
"""What values are ordered by, and the exact selection of the largest absolute values.

How the loops are compiled: :mod:`llmfusion.merging.compiled`.
"""

import numpy as np

from llmfusion.merging.compiled import LANES, SIZE, TILE, compiled, total_of


# ------------------------------------------------------------------------------------------------ keys of a selection
@compiled
def rates(theta, delta, eps, keys):
    """``keys = |delta| / (|theta| + eps)``, computed in float64 and rounded to float32 once."""
    for i in range(theta.size):
        keys[i] = np.float32(abs(np.float64(delta[i])) / (abs(np.float64(theta[i])) + eps))


@compiled
def rates_and_moments(theta, delta, eps, centre, keys, sums):
    """As :func:`rates`; adds sums of ``d``, ``d^2``, ``d^3``, ``d = rate - centre`` in float64, to ``sums (3,)``."""
    n = theta.size
    first = np.zeros(LANES)
    second = np.zeros(LANES)
    third = np.zeros(LANES)
    for start in range(0, n, LANES):
        end = min(start + LANES, n)
        pivot = theta[start:end]
        change = delta[start:end]
        key = keys[start:end]
        for k in range(pivot.size):
            rate = abs(np.float64(change[k])) / (abs(np.float64(pivot[k])) + eps)
            key[k] = np.float32(rate)
            d = rate - centre
            first[k] += d
            second[k] += d * d
            third[k] += d * d * d
    sums[0] += total_of(first)
    sums[1] += total_of(second)
    sums[2] += total_of(third)


@compiled
def log_moments(theta, delta, eps, centre, sums):
    """Adds the same sums for ``d = log(rate) - centre``, where the delta is not 0; returns how many those are."""
    count = 0
    for i in range(theta.size):
        if delta[i] != np.float32(0):
            d = np.log(abs(np.float64(delta[i])) / (abs(np.float64(theta[i])) + eps)) - centre
            sums[0] += d
            sums[1] += d * d
            sums[2] += d * d * d
            count += 1
    return count


@compiled
def spreads(deltas, keys):
    """``keys = sqrt(sum_j (J delta_j - sum delta)^2)``, the standard deviation over the models times J^1.5.

    In float64, rounded to float32 once; exactly 0 where all models agree; no division, and no square that underflows.
    """
    models, n = deltas.shape
    total = np.empty(TILE)
    spread = np.empty(TILE)
    factor = np.float64(models)
    last = models - 1
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        key = keys[start:end]
        row = deltas[0, start:end]
        for i in range(row.size):
            total[i] = np.float64(row[i])
        for j in range(1, models):
            row = deltas[j, start:end]
            for i in range(row.size):
                total[i] += np.float64(row[i])
        spread[:] = 0.0
        for j in range(last):
            row = deltas[j, start:end]
            for i in range(row.size):
                d = factor * np.float64(row[i]) - total[i]
                spread[i] += d * d
        row = deltas[last, start:end]
        for i in range(row.size):
            d = factor * np.float64(row[i]) - total[i]
            key[i] = np.float32(np.sqrt(spread[i] + d * d))


# ------------------------------------------------------------------------------------------------ selecting exactly
@compiled
def count_coarse(keys, histogram):
    """Add keys (n,) to a histogram of the upper 16 bits of their size; returns how many are not 0."""
    bits = keys.view(np.uint32)
    for i in range(bits.size):
        histogram[np.uint32(bits[i] & SIZE) >> np.uint32(16)] += 1
    nonzero = np.int32(0)
    for i in range(bits.size):
        nonzero = np.int32(nonzero + np.int32(np.uint32(bits[i] & SIZE) != np.uint32(0)))
    return nonzero


@compiled
def count_fine(keys, bin_, deltas, histogram, sums, places):
    """Add the keys whose upper 16 bits are ``bin_`` to a histogram of the lower 16, and the squares of ``deltas`` there
    to ``sums``.

    ``deltas (M, n)``, ``sums (M, 65536)``; ``places (n,)`` is scratch. Returns the sums of the deltas' squares over the
    keys above that bin, ``(M,)``.
    """
    bits = keys.view(np.uint32)
    count = 0
    for start in range(0, bits.size, LANES):
        part = bits[start : start + LANES]
        some = np.int32(0)
        for i in range(part.size):
            some = np.int32(some + np.int32(np.uint32(np.uint32(part[i] & SIZE) >> np.uint32(16)) == bin_))
        if some:  # few of them hold one, so all are looked at together before one by one
            for i in range(part.size):
                places[count] = start + i
                count += np.int64(np.uint32(np.uint32(part[i] & SIZE) >> np.uint32(16)) == bin_)
    for place in range(count):
        i = places[place]
        low = bits[i] & np.uint32(0xFFFF)
        histogram[low] += 1
        for j in range(deltas.shape[0]):
            value = np.float64(deltas[j, i])
            sums[j, low] += value * value
    above = np.empty(deltas.shape[0])
    for j in range(above.size):
        above[j] = squares_above(bits, np.uint32(np.uint32(bin_ << np.uint32(16)) | np.uint32(0xFFFF)), deltas[j])
    return above


@compiled
def squares_above(bits, last, delta):
    lanes = np.zeros(LANES)
    for start in range(0, bits.size, LANES):
        key = bits[start : start + LANES]
        part = delta[start : start + LANES]
        for k in range(key.size):
            value = np.float64(part[k]) if np.uint32(key[k] & SIZE) > last else 0.0
            lanes[k] += value * value
    return total_of(lanes)


@compiled
def bin_of(histogram, number):
    """The bin that holds the ``number``-th largest value, and how many of it are still wanted."""
    place = histogram.size - 1
    while place > 0 and histogram[place] < number:
        number -= histogram[place]
        place -= 1
    return place, number


@compiled
def locate(keys, threshold, wanted):
    """Position just behind the ``wanted``-th key that equals ``threshold``, and how many there are.

    The block's end if there are fewer.
    """
    bits = keys.view(np.uint32)
    equal = np.int32(0)
    for i in range(bits.size):
        equal = np.int32(equal + np.int32(np.uint32(bits[i] & SIZE) == threshold))
    if equal < wanted:
        return bits.size, equal
    count = 0
    for i in range(bits.size):
        if np.uint32(bits[i] & SIZE) == threshold:
            count += 1
            if count == wanted:
                return i + 1, count
    return bits.size, count


@compiled
def squares_tied(keys, threshold, end, delta):
    """Sum of ``delta^2`` where the key equals ``threshold``, before position ``end``."""
    bits = keys.view(np.uint32)
    total = 0.0
    for i in range(end):
        if np.uint32(bits[i] & SIZE) == threshold:
            total += np.float64(delta[i]) * np.float64(delta[i])
    return total


@compiled
def trim(keys, threshold, end, delta):
    """Set ``delta`` to 0 in place where it is not selected.

    That is where keys are below ``threshold``, or equal to it from position ``end`` on.
    """
    sizes = np.empty(TILE, np.uint32)
    for start in range(0, delta.size, TILE):
        part = delta[start : start + TILE]
        key = keys[start : start + TILE].view(np.uint32)
        left = np.int32(end - start)
        for i in range(part.size):
            sizes[i] = key[i] & SIZE
        for i in range(part.size):  # a loop of its own, since keys may be delta itself
            part[i] = part[i] if np.uint32(sizes[i] + np.uint32(np.int32(i) < left)) > threshold else np.float32(0)
