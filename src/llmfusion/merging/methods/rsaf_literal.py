"""RSAF as printed: only the selected values are merged, without a division; nearly the pivot.

As Algorithm 1 of InfiFusion (arXiv 2501.02795) has it: ``rsaf`` with ``select_scope: values`` and ``normalize: none``.
See docs/methods.md for what that leaves of the deltas.
"""

from typing import Literal

from pydantic import Field

from llmfusion.merging.blocks import PivotDeltas, TensorMerge
from llmfusion.merging.option_types import Eps, Rate, SelectBy
from llmfusion.merging.rate_of_change import RateSelection
from llmfusion.merging.sign_consensus import merge_by_energy
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    method: Literal["rsaf_literal"] = Field(
        description="RSAF as printed: only the selected values are merged, without a division; nearly the pivot"
    )
    tau: float = Field(
        0.1, gt=0, le=1, description="share of the positions that are selected, before the skewness changes it"
    )
    eps: Eps = 1e-8
    rate: Rate = "relative"
    select_by: SelectBy = "rate"


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """The report has the same figures as that of ``rsaf``."""
    selection = RateSelection(tensor, options.tau, options.eps, options.rate, options.select_by)
    return merge_by_energy(tensor, selection.squares, selection.notes, normalize=False, selected=selection.selected)
