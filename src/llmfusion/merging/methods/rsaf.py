"""RSAF: as SCE, but selecting by the rate of change, a share set by its skewness.

InfiFusion, arXiv 2501.02795, Algorithm 1; its equations are at :class:`llmfusion.merging.rate_of_change.RateSelection`.
The coefficients are the models' shares in the selected squares; minority signs are erased.
"""

from typing import Literal

from pydantic import Field

from llmfusion.merging.blocks import PivotDeltas, TensorMerge
from llmfusion.merging.option_types import Eps, Normalize, Rate, SelectBy, SelectScope, Tau
from llmfusion.merging.rate_of_change import RateSelection
from llmfusion.merging.sign_consensus import merge_by_energy
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    method: Literal["rsaf"] = Field(
        description="RSAF: as SCE, but selecting by the rate of change, a share set by its skewness"
    )
    tau: Tau = 0.1
    select_scope: SelectScope = "coefficients"
    normalize: Normalize = "disjoint"
    eps: Eps = 1e-8
    rate: Rate = "relative"
    select_by: SelectBy = "rate"


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    """The report has each model's skewness ``S``, share ``K``, count ``k``, threshold and coefficient ``eta``."""
    selection = RateSelection(tensor, options.tau, options.eps, options.rate, options.select_by)
    return merge_by_energy(
        tensor,
        selection.squares,
        selection.notes,
        normalize=options.normalize == "disjoint",
        selected=selection.selected if options.select_scope == "values" else None,
    )
