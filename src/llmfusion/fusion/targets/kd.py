"""One teacher's distribution (Hinton).

Knowledge distillation from a single teacher: weight 1 wherever it is usable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfusion.fusion.target import FusionTarget, TeacherStats
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor


class Options(FusionOptions):
    target: Literal["kd"] = Field(description="one teacher's distribution (Hinton)")


class Target(FusionTarget):
    title = "Knowledge fusion"
    min_teachers = 1
    max_teachers = 1

    def forward(self, stats: TeacherStats) -> tuple[Tensor, None]:
        """Weight 1 where the teacher is usable, (N, 1)."""
        return stats.mask.clone(), None
