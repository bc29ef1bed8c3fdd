# mypy: disable-error-code="assignment"
"""The arithmetic of merging, compiled: loops over one block of one tensor that release the interpreter's lock.

Sums are kept in float64 over ``LANES`` interleaved lanes, added up in lane order: the order of additions is that of the code,
not of a machine's vector width, so the same input gives the same bits everywhere. Nothing here is re-associated by the compiler.

Compiled code is kept in ``NUMBA_CACHE_DIR`` if that is set, else in ``$XDG_CACHE_HOME/llmfusion`` (``~/.cache/llmfusion``); where neither
can be written, as for a read-only home, in a private folder for temporary files. The first merge on a machine compiles, all later ones load.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np

LANES = 64
TILE = 1024  # values worked on at once: their intermediate results stay in the innermost cache


def cache_folder() -> str:
    """Where compiled code goes: the first of the places above that this user can write, made if it is not there."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return given
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(home) / "llmfusion", Path(tempfile.gettempdir()) / f"llmfusion-{os.getuid()}"):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.stat().st_uid == os.getuid() and os.access(place, os.W_OK | os.X_OK):  # cached code is run: it must be ours
                return str(place)
        except OSError:
            continue
    return tempfile.mkdtemp(prefix="llmfusion-")


def _load_without_scipy() -> None:
    """numba looks for scipy's matrix products when it loads its functions: half a second of every start, for what is not used here."""
    name = "scipy.linalg.cython_blas"
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]
        importlib.import_module("numba.np.arraymath")
        del sys.modules[name]


_load_without_scipy()
numba.config.CACHE_DIR = cache_folder()  # type: ignore[attr-defined]


def _compiled(function: Any) -> Any:
    # error_model: a division by zero gives infinity, as in numpy, and loops stay free of branches
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


@_compiled
def total_of(lanes):
    total = 0.0
    for k in range(lanes.size):
        total += lanes[k]
    return total


# ------------------------------------------------------------------------------------------------ reading and writing
@_compiled
def widen(bits, out):
    """bfloat16 bits (n,) uint16 to float32 (n,): exact."""
    view = out.view(np.uint32)
    for i in range(bits.size):
        view[i] = np.uint32(bits[i]) << np.uint32(16)


@_compiled
def widen_difference(bits, theta, out):
    """``out = phi - theta`` in float32 for phi in bfloat16 bits."""
    view = out.view(np.uint32)
    for i in range(bits.size):
        view[i] = np.uint32(bits[i]) << np.uint32(16)
    for i in range(bits.size):
        out[i] = out[i] - theta[i]


@_compiled
def narrow(values, out):
    """float32 (n,) to bfloat16 bits (n,) uint16, to the nearest, ties to even. For finite values."""
    view = values.view(np.uint32)
    for i in range(values.size):
        bits = view[i]
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled
def magnitude(values):
    """The largest absolute value as float32 bits; above 0x7F7FFFFF there is an infinity or a NaN."""
    view = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(values.size):
        bits = view[i] & np.uint32(0x7FFFFFFF)
        largest = max(largest, bits)
    return largest


# ------------------------------------------------------------------------------------------------ what the report says
@_compiled
def survey(delta):
    """The largest absolute value as float32 bits, how many values are not 0, and the sum of squares in float64."""
    bits = delta.view(np.uint32)
    lanes = np.zeros(LANES)
    largest, nonzero, n = np.uint32(0), 0, delta.size
    for start in range(0, n, LANES):
        part = delta[start : min(start + LANES, n)]
        for k in range(part.size):
            value = np.float64(part[k])
            lanes[k] += value * value
    for i in range(n):
        size = bits[i] & np.uint32(0x7FFFFFFF)
        largest = max(largest, size)
        nonzero += np.int32(size != np.uint32(0))
    return largest, nonzero, total_of(lanes)


@_compiled
def count_conflicts(deltas, signs):
    """At how many positions of ``deltas (J, n)`` both signs occur; ``signs (n,)`` uint8 is scratch."""
    n = deltas.shape[1]
    signs[:n] = 0
    for j in range(deltas.shape[0]):
        row = deltas[j]
        for i in range(n):
            signs[i] |= np.uint8(row[i] > np.float32(0)) | (np.uint8(row[i] < np.float32(0)) << np.uint8(1))
    count = 0
    for i in range(n):
        count += np.int32(signs[i] == np.uint8(3))
    return count


@_compiled
def moved(merged, theta):
    """How many values differ from the pivot's, and the sum of squares of the differences."""
    lanes = np.zeros(LANES)
    n = merged.size
    for start in range(0, n, LANES):
        new, old = merged[start : min(start + LANES, n)], theta[start : min(start + LANES, n)]
        for k in range(new.size):
            value = np.float64(new[k]) - np.float64(old[k])
            lanes[k] += value * value
    count = 0
    for i in range(n):
        count += np.int32(merged[i] != theta[i])
    return count, total_of(lanes)


# ------------------------------------------------------------------------------------------------ keys of a selection
@_compiled
def sizes(delta, keys):
    """``keys = |delta|``."""
    for i in range(delta.size):
        keys[i] = abs(delta[i])


@_compiled
def rates(theta, delta, eps, keys):
    """``keys = |delta| / (|theta| + eps)``, computed in float64 and rounded to float32 once."""
    for i in range(theta.size):
        keys[i] = np.float32(abs(np.float64(delta[i])) / (abs(np.float64(theta[i])) + eps))


@_compiled
def rates_and_moments(theta, delta, eps, centre, keys, sums):
    """As :func:`rates`; adds the sums of ``d``, ``d^2`` and ``d^3``, ``d = rate - centre`` in float64, to ``sums (3,)``."""
    n = theta.size
    first, second, third = np.zeros(LANES), np.zeros(LANES), np.zeros(LANES)
    for start in range(0, n, LANES):
        end = min(start + LANES, n)
        pivot, change, key = theta[start:end], delta[start:end], keys[start:end]
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


@_compiled
def log_moments(theta, delta, eps, centre, sums):
    """Sums of ``d``, ``d^2``, ``d^3`` as above for ``d = log(rate) - centre``, where the delta is not 0; returns how many those are."""
    count = 0
    for i in range(theta.size):
        if delta[i] != np.float32(0):
            d = np.log(abs(np.float64(delta[i])) / (abs(np.float64(theta[i])) + eps)) - centre
            sums[0] += d
            sums[1] += d * d
            sums[2] += d * d * d
            count += 1
    return count


@_compiled
def spreads(deltas, keys):
    """``keys = sqrt(sum_j (J delta_j - sum delta)^2)``, the standard deviation over the models times J^1.5.

    In float64, rounded to float32 once; exactly 0 where all models agree; no division, and no square that underflows.
    """
    models, n = deltas.shape
    total, spread = np.empty(TILE), np.empty(TILE)
    factor = np.float64(models)
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        key = keys[start:end]
        total[:] = 0.0
        spread[:] = 0.0
        for j in range(models):
            row = deltas[j, start:end]
            for i in range(row.size):
                total[i] += np.float64(row[i])
        for j in range(models):
            row = deltas[j, start:end]
            for i in range(row.size):
                d = factor * np.float64(row[i]) - total[i]
                spread[i] += d * d
        for i in range(key.size):
            key[i] = np.float32(np.sqrt(spread[i]))


# ------------------------------------------------------------------------------------------------ selecting exactly
@_compiled
def count_coarse(keys, histogram):
    """Add keys (n,) >= 0 to a histogram of the upper 16 bits; returns how many are not 0."""
    bits = keys.view(np.uint32)
    for i in range(bits.size):
        histogram[bits[i] >> np.uint32(16)] += 1
    nonzero = 0
    for i in range(bits.size):
        nonzero += np.int32(bits[i] != np.uint32(0))
    return nonzero


@_compiled
def count_fine(keys, bin_, delta, histogram, sums):
    """Add the keys whose upper 16 bits are ``bin_`` to a histogram of the lower 16, and their ``delta^2`` to ``sums`` at the same
    place; returns the sum of ``delta^2`` over the keys above that bin."""
    bits = keys.view(np.uint32)
    last = np.uint32(bin_) << np.uint32(16) | np.uint32(0xFFFF)
    lanes = np.zeros(LANES)
    n = bits.size
    for start in range(0, n, LANES):
        key, part = bits[start : min(start + LANES, n)], delta[start : min(start + LANES, n)]
        for k in range(key.size):
            value = np.float64(part[k]) if key[k] > last else 0.0
            lanes[k] += value * value
    for i in range(n):
        if bits[i] >> np.uint32(16) == bin_:
            low = bits[i] & np.uint32(0xFFFF)
            value = np.float64(delta[i])
            histogram[low] += 1
            sums[low] += value * value
    return total_of(lanes)


@_compiled
def bin_of(histogram, number):
    """The bin that holds the ``number``-th largest value, and how many of it are still wanted."""
    place = histogram.size - 1
    while place > 0 and histogram[place] < number:
        number -= histogram[place]
        place -= 1
    return place, number


@_compiled
def locate(keys, threshold, wanted):
    """Position just behind the ``wanted``-th key that equals ``threshold`` (the block's end if there are fewer), and how many were found."""
    bits = keys.view(np.uint32)
    equal = 0
    for i in range(bits.size):
        equal += np.int32(bits[i] == threshold)
    if equal < wanted:
        return bits.size, equal
    found = 0
    for i in range(bits.size):
        if bits[i] == threshold:
            found += 1
            if found == wanted:
                return i + 1, found
    return bits.size, found


@_compiled
def squares_tied(keys, threshold, end, delta):
    """Sum of ``delta^2`` where the key equals ``threshold``, before position ``end``."""
    bits = keys.view(np.uint32)
    total = 0.0
    for i in range(end):
        if bits[i] == threshold:
            total += np.float64(delta[i]) * np.float64(delta[i])
    return total


@_compiled
def trim(keys, threshold, end, delta):
    """Set ``delta`` to 0 in place where it is not selected: keys below ``threshold``, and keys equal to it from position ``end`` on."""
    bits = keys.view(np.uint32)
    first, key = delta[:end], bits[:end]
    for i in range(first.size):
        first[i] = first[i] if key[i] >= threshold else np.float32(0)
    rest, key = delta[end:], bits[end:]
    for i in range(rest.size):
        rest[i] = rest[i] if key[i] > threshold else np.float32(0)


# ------------------------------------------------------------------------------------------------ merging
@_compiled
def add_weighted(theta, deltas, weights, scale, out):
    """``theta + scale sum_j weights_j deltas_j``, in float32, models in order."""
    models, n = deltas.shape
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        pivot, merged = theta[start:end], out[start:end]
        merged[:] = np.float32(0)
        for j in range(models):
            row, weight = deltas[j, start:end], weights[j]
            for i in range(row.size):
                merged[i] += weight * row[i]
        for i in range(pivot.size):
            merged[i] = pivot[i] + scale * merged[i]


@_compiled
def add_agreeing(theta, deltas, votes, weights, normalize, scale, out):
    """Elect the sign of ``sum_j votes_j deltas_j``, + where it is 0; ``theta + scale sum_j weights_j deltas_j`` over the models whose
    ``votes_j deltas_j`` has that sign, divided by the sum of their weights if ``normalize`` (and that is not 0). float32, models in order."""
    models, n = deltas.shape
    vote, total, share = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        pivot, merged = theta[start:end], out[start:end]
        vote[:] = zero
        total[:] = zero
        share[:] = zero
        for j in range(models):
            row, own = deltas[j, start:end], votes[j]
            for i in range(row.size):
                vote[i] += own * row[i]
        for j in range(models):
            row, own, weight = deltas[j, start:end], votes[j], weights[j]
            for i in range(row.size):
                cast = own * row[i]
                agrees = (cast > zero) if vote[i] >= zero else (cast < zero)
                total[i] += weight * row[i] if agrees else zero
                share[i] += weight if agrees else zero
        for i in range(pivot.size):
            divisor = share[i] if normalize and share[i] != zero else one
            merged[i] = pivot[i] + scale * (total[i] / divisor)
