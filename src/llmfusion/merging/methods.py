"""Merge methods as pure functions: pivot and deltas of one tensor in, merged tensor out, all in float32.

``theta (n,)`` is the pivot's tensor, ``deltas (J, n)`` are the models minus the pivot. Options are those of
:mod:`llmfusion.config.merging`, defaults left out.
"""

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


METHODS: dict[str, Callable[[Array, Array, dict[str, Any]], Merged]] = {"ta": ta}
