"""Options and targets as a study would give them."""

from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from llmfusion.fusion.objective import build_target
from llmfusion.fusion.target import TeacherStats
from llmfusion.study.schema.fusion import Fusion
from llmfusion.study.schema.options import FusionOptions


def fusion_options(target: str = "kd", **keys: Any) -> FusionOptions:
    """Options of a target as a study's file states them, ``lambda`` under that name."""
    options: FusionOptions = TypeAdapter(Fusion).validate_python({"target": target, **keys})
    return options


def target_weights(target: str, stats: TeacherStats, **keys: Any) -> Tensor:
    """Weights (N, K) that a target gives the teachers."""
    return build_target(fusion_options(target, **keys), stats.mask.shape[1], 8)(stats)[0]


# A target with learned parameters, as a plug-in's file.
GATE = '''"""Teachers weighted by a learned softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfusion.fusion.target import FusionTarget, TeacherStats
from llmfusion.io.lazy import torch
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor


class Options(FusionOptions):
    target: Literal["gate"] = Field(description="teachers weighted by a learned softmax")
    balance: float = Field(0.1, ge=0, description="weight of the penalty on unequal weights")
    target_lr: float = Field(0.02, gt=0, lt=1, description="peak learning rate of the gate")


class Target(FusionTarget):
    title = "Gated fusion"
    options: Options

    def __init__(self, options: Options, teachers: int, hidden_size: int):
        super().__init__(options, teachers, hidden_size)
        self.learning_rate = options.target_lr
        self.gate = torch.nn.Linear(2 * teachers, teachers)

    def forward(self, stats: TeacherStats) -> tuple[Tensor, Tensor]:
        """Weights (N, K) that sum to 1 over the usable teachers, and the mean square of their distance from 1 / K."""
        scores = self.gate(torch.cat([stats.entropy, stats.cross_entropy], 1).to(self.gate.weight.dtype))  # (N, K)
        weights = torch.nan_to_num(scores.masked_fill(stats.mask == 0, -torch.inf).softmax(1)) * stats.mask
        penalty = (weights - 1 / weights.shape[1]).square().sum(1).mean()
        return weights, self.options.balance * penalty
'''
