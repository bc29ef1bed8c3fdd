"""TIES: trim, elect a sign, average what agrees.

Keep the ``density`` largest |delta| of each model, ``int(density n)`` values and at least one; the sign of a position
is that of the weighted sum, + where it is 0 (Yadav et al. 2023, arXiv 2306.01708). ``normalize`` divides by the weights
that agree.
"""

from typing import ClassVar, Literal

from pydantic import Field

from llmfusion.merging.blocks import Array, Block, PivotDeltas, TensorMerge
from llmfusion.merging.option_types import Weight, weights_of
from llmfusion.merging.selection import select_per_model
from llmfusion.merging.sign_consensus import SelectedDeltas, energy_share, merge_agreeing
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    seconds_per_value: ClassVar[float] = 8e-9
    method: Literal["ties"] = Field(description="TIES: trim, elect a sign, average what agrees")
    density: float = Field(
        0.6, gt=0, le=1, description="share of each delta that is kept, the largest in absolute value"
    )
    weight: Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(True, description="divide by the weights that agree")


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """The report has the number ``k`` of values kept of each model and their smallest |delta|."""
    weights = weights_of(options.weight, tensor.models, default=1.0)
    count = max(1, int(options.density * tensor.size)) if tensor.size else 0

    def sort_keys(block: Block, first_pass: bool) -> Array:
        return block.deltas

    selections = select_per_model(tensor, sort_keys, lambda selections: [count] * tensor.models)
    kept = energy_share(sum(selection.squares[0] for selection in selections), tensor)
    thresholds = {f"threshold_{j}": selection.value for j, selection in enumerate(selections)}
    merge_block = merge_agreeing(
        tensor,
        weights,
        weights,
        normalize=options.normalize,
        scale=options.scale,
        selected=SelectedDeltas(sort_keys, selections),
    )
    return TensorMerge(merge_block, {"k": float(count), **thresholds, "kept_energy": kept}, kept)
