"""The teacher with the lowest cross-entropy on the response (FuseLLM).

MinCE: weight 1 on that teacher, 0 on the others. ``granularity: sequence`` compares the means over a sample's usable
tokens and chooses once, ``token`` chooses at every token. A tie goes to the teacher named first.
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
    target: Literal["mince"] = Field(description="the teacher with the lowest cross-entropy on the response (FuseLLM)")
    granularity: Literal["sequence", "token"] = Field(
        "sequence", description="choose once a sample (FuseLLM's code) or at every token"
    )


class Target(FusionTarget):
    title = "Unified fusion, MinCE"
    accepts_pivot = True  # FuseLLM lets the pivot compete with its sources
    options: Options

    def forward(self, stats: TeacherStats) -> tuple[Tensor, None]:
        """Weight 1 for the best teacher of each token where it is usable, (N, K)."""
        cost = stats.cross_entropy.masked_fill(stats.mask == 0, torch.inf)
        if self.options.granularity == "sequence":
            cost = sequence_means(stats)[stats.sequence]
        best = cost.argmin(dim=1)  # (N,), the first of equal ones
        return torch.nn.functional.one_hot(best, cost.shape[1]).to(stats.mask.dtype) * stats.mask, None


def sequence_means(stats: TeacherStats) -> Tensor:
    """Mean cross-entropy of each of S samples under each teacher, (S, K); infinite without a usable token."""
    count = int(stats.sequence.max()) + 1 if len(stats.sequence) else 0
    sequence = stats.sequence.cpu()
    zeros = torch.zeros(count, stats.mask.shape[1], dtype=torch.float64)
    total = zeros.index_add(0, sequence, (stats.cross_entropy * stats.mask).double().cpu())
    tokens = zeros.index_add(0, sequence, stats.mask.double().cpu())
    return torch.where(tokens > 0, total / tokens.clamp(min=1), torch.inf).to(stats.cross_entropy.device)
