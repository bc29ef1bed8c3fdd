"""SCE: select by variance, calculate coefficients, erase minority signs.

Wan et al. 2024, arXiv 2408.07990. Of the positions whose variance over the models is not 0, the ``tau`` share with the
largest is selected, ``int(tau nonzero)`` of them; with ``tau: 1``, or one model, all. The coefficients are the models'
shares in the selected squares.
"""

from typing import Literal

from pydantic import Field

from llmfusion.merging.blocks import Array, Block, PivotDeltas, TensorMerge
from llmfusion.merging.lazy import ranking
from llmfusion.merging.option_types import Normalize, SelectScope, Tau
from llmfusion.merging.selection import select
from llmfusion.merging.sign_consensus import SelectedDeltas, merge_by_energy
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    method: Literal["sce"] = Field(description="SCE: select by variance, calculate coefficients, erase minority signs")
    tau: Tau = 0.1
    select_scope: SelectScope = "coefficients"
    normalize: Normalize = "disjoint"


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """The report has the number ``k`` of positions selected and the smallest standard deviation among them."""
    disjoint = options.normalize == "disjoint"
    if options.tau >= 1 or tensor.models == 1:
        tensor.survey()
        notes = {"k": float(tensor.size), "threshold": 0.0}
        return merge_by_energy(tensor, tensor.energies, notes, normalize=disjoint)
    scratch = tensor.scratch(1)  # (1, c): one row of keys for all models

    def sort_keys(block: Block, first_pass: bool) -> Array:
        keys = scratch[:, : block.theta.size]
        ranking.spreads(block.deltas, keys[0])
        return keys

    (selection,) = select(
        tensor, sort_keys, [range(tensor.models)], lambda selections: [int(options.tau * selections[0].nonzero)]
    )
    notes = {
        "k": float(selection.count),
        "threshold": selection.value / tensor.models**1.5,
    }  # keys are J^1.5 times that
    selected = SelectedDeltas(sort_keys, [selection] * tensor.models) if options.select_scope == "values" else None
    return merge_by_energy(tensor, selection.squares, notes, normalize=disjoint, selected=selected)
