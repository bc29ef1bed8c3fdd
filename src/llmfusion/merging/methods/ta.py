"""Task arithmetic: pivot + lambda * sum of weighted deltas.

``theta + lambda sum_j w_j delta_j`` (Ilharco et al. 2023, arXiv 2212.04089); weight 1/J by default, so the mean.
``normalize`` divides by the sum of the weights.
"""

from typing import ClassVar, Literal

from pydantic import Field

from llmfusion.errors import require
from llmfusion.io.lazy import np
from llmfusion.merging.blocks import Array, Block, PivotDeltas, TensorMerge
from llmfusion.merging.lazy import kernels
from llmfusion.merging.option_types import Weight, weights_of
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    seconds_per_value: ClassVar[float] = 2e-9
    method: Literal["ta"] = Field(description="task arithmetic: pivot + lambda * sum of weighted deltas")
    weight: Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(False, description="divide by the sum of the weights")


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """Raises :class:`UserError` where ``normalize`` would divide by 0."""
    weights = weights_of(options.weight, tensor.models, default=1.0 / tensor.models)
    if options.normalize:
        weights = _normalized(weights)
    scale = np.float32(options.scale)
    out = tensor.scratch()

    def merge_block(block: Block) -> Array:
        kernels.add_weighted(block.theta, block.deltas, weights, scale, out)
        return out[: block.theta.size]

    return TensorMerge(merge_block)


def _normalized(weights: Array) -> Array:
    total = weights.astype(np.float64).sum()
    require(
        total != 0,
        f"weight: {weights.tolist()} have the sum 0, by which normalize: true divides; "
        "give other weights, or normalize: false",
    )
    normalized: Array = (weights / total).astype(np.float32)
    return normalized
