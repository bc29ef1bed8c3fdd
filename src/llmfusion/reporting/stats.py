"""Shares in per cent, means, and their standard errors."""

import math
from collections.abc import Sequence


def per_cent(k: int, n: int) -> tuple[float, float]:
    """``(100 k/n, its standard error)``, both in points; the error is the binomial one, ``100 sqrt(p (1-p) / n)``.

    Raises :class:`ValueError` without items.
    """
    if n <= 0:
        raise ValueError("a score needs at least one item")
    p = k / n
    return round(100 * p, 6), round(100 * math.sqrt(p * (1 - p) / n), 6)


def mean(values: Sequence[float]) -> float:
    """Unweighted mean."""
    return round(math.fsum(values) / len(values), 6)


def error_of_mean(errors: Sequence[float]) -> float:
    """Standard error of the mean of independent values with these standard errors."""
    return round(math.sqrt(math.fsum(e * e for e in errors)) / len(errors), 6)


def standard_error(values: Sequence[float], errors: Sequence[float]) -> float:
    """Standard error of the mean of replicates, from their spread (n - 1); of a single value its own, ``errors[0]``."""
    if len(values) == 1:
        return errors[0]
    middle = math.fsum(values) / len(values)
    return round(math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values)), 6)
