"""The teachers' KD losses, summed.

InfiFusion's naive baseline ("directly sums"), or with ``reduction: mean`` the mean over the usable teachers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfusion.fusion.target import FusionTarget, TeacherStats
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor


class Options(FusionOptions):
    target: Literal["naive"] = Field(description="the teachers' KD losses, summed")
    reduction: Literal["sum", "mean"] = Field("sum", description="sum (the paper) or mean over the teachers")


class Target(FusionTarget):
    title = "Unified fusion, naive"
    options: Options

    def forward(self, stats: TeacherStats) -> tuple[Tensor, None]:
        """Weight 1 for each usable teacher, or one over their number at the token, (N, K)."""
        if self.options.reduction == "sum":
            return stats.mask.clone(), None
        return stats.mask / stats.mask.sum(dim=1, keepdim=True).clamp(min=1), None
