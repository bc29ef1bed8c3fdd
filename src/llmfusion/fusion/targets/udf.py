"""Teachers weighted by 1 / (entropy + cross-entropy) at every token (eq. 5).

InfiFusion's uncertainty-based distribution fusion: ``w_k = 1 / (H(P^k) + CE(y, P^k) + epsilon)``, normalised over the
usable teachers of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfusion.fusion.target import FusionTarget, TeacherStats
from llmfusion.io.lazy import torch
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor


class Options(FusionOptions):
    target: Literal["udf"] = Field(
        description="teachers weighted by 1 / (entropy + cross-entropy) at every token (eq. 5)"
    )
    epsilon: float = Field(1e-6, gt=0, description="added to entropy + cross-entropy, in nats")


class Target(FusionTarget):
    title = "Unified fusion, UDF"
    topk_refusal = "weighs teachers by their whole distributions"
    options: Options

    def forward(self, stats: TeacherStats) -> tuple[Tensor, None]:
        """Weights that sum to 1 over the usable teachers of a token, (N, K)."""
        score = stats.mask / (stats.entropy + stats.cross_entropy + self.options.epsilon)
        return score / score.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny), None
