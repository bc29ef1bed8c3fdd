"""Merging plain arrays, without checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfusion.merging.blocks import Array, PivotDeltas
from llmfusion.merging.options import options_of
from llmfusion.study.merge_methods import load_method
from llmfusion.study.schema.options import MergeOptions


def merge_arrays(
    method: str,
    theta: NDArray[Any],
    models: Sequence[NDArray[Any]],
    options: MergeOptions | Mapping[str, Any] | None = None,
    *,
    deltas: bool = False,
    name: str = "",
    layers: int = 0,
) -> tuple[Array, dict[str, float]]:
    """Merge plain arrays of one shape: the pivot's ``theta`` and those of the models, with ``deltas`` given minus the
    pivot.

    ``options`` are an instance of the method's ``Options``, or those that are not the default by their names in a
    study, such as ``{"lambda": 0.5}``. ``name`` and ``layers`` are for methods that look at the tensor's name or layer.
    Returns the merge in float32 and the method's notes. Raises :class:`UserError` for unknown methods and options, and
    for values that are not finite.
    """
    if not isinstance(options, MergeOptions):
        options = options_of(method, dict(options or {}), len(models))
    flat = [np.ravel(model) for model in models]
    tensor = PivotDeltas(np.ravel(theta), flat, deltas=deltas, name=name, shape=np.shape(theta), layers=layers)
    merge = load_method(method).merge(tensor, options)
    out = np.empty(tensor.size, np.float32)
    for block in tensor.blocks():
        out[block.start : block.start + block.theta.size] = merge.merge_block(block)
    return out.reshape(np.shape(theta)), merge.notes
