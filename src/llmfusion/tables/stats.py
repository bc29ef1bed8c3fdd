"""What a cell is worth: shares in per cent and their standard errors."""

import math
from collections.abc import Sequence


def per_cent(k: int, n: int) -> tuple[float, float]:
    """``(100 k/n, its standard error)``, both in points; the error is the binomial one, ``100 sqrt(p (1-p) / n)``."""
    if n <= 0:
        raise ValueError("a score needs at least one item")
    p = k / n
    return round(100 * p, 6), round(100 * math.sqrt(p * (1 - p) / n), 6)


def mean(scores: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Unweighted mean of independent scores, and its standard error."""
    return round(sum(scores) / len(scores), 6), round(math.sqrt(sum(e * e for e in errors)) / len(scores), 6)
