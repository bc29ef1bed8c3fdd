"""A fusion target is a weight function: how much each teacher counts at each label token.

For row t with K teachers the loss is ``(1 - lambda) CE(y, p) + lambda sum_k w_tk KL(P^k_T || p_T)``; the targets differ only
in w. Each function takes :class:`Stats` and its options and returns ``w (N, K)``, never negative, zero where the mask is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherStats:
    """What teachers say about N label tokens, in nats and at temperature 1.

    ``entropy (N, K)`` of each teacher's distribution, ``cross_entropy (N, K)`` = -log P^k(y), ``mask (N, K)`` 1 where the
    teacher is usable, ``sequence (N,)`` the number of the sample a token belongs to, from 0 without gaps.
    """

    entropy: Tensor
    cross_entropy: Tensor
    mask: Tensor
    sequence: Tensor


def kd(stats: TeacherStats, options: Any) -> Tensor:
    """Hinton's distillation: weight 1 on the one teacher."""
    return stats.mask.clone()


def naive(stats: TeacherStats, options: Any) -> Tensor:
    """The teachers' KD losses summed (InfiFusion, "directly sums"), or with ``reduction: mean`` the mean over the usable ones."""
    if options.reduction == "sum":
        return stats.mask.clone()
    return stats.mask / stats.mask.sum(dim=1, keepdim=True).clamp(min=1)


def mince(stats: TeacherStats, options: Any) -> Tensor:
    """Weight 1 on the teacher with the lowest cross-entropy (FuseLLM's MinCE), 0 on the others.

    ``granularity: sequence`` compares the means over a sample's usable tokens and chooses once, ``token`` chooses at every
    token. A tie goes to the teacher named first.
    """
    cost = stats.cross_entropy.masked_fill(stats.mask == 0, torch.inf)
    if options.granularity == "sequence":
        cost = _sequence_mean(stats)[stats.sequence]
    best = cost.argmin(dim=1)  # (N,), the first of equal ones
    return torch.nn.functional.one_hot(best, cost.shape[1]).to(stats.mask.dtype) * stats.mask


def _sequence_mean(stats: TeacherStats) -> Tensor:
    """Mean cross-entropy of each sample under each teacher, (S, K); infinite for a teacher without a usable token."""
    count = int(stats.sequence.max()) + 1 if len(stats.sequence) else 0
    shape = (count, stats.mask.shape[1])
    total = torch.zeros(shape, dtype=torch.float64).index_add_(
        0, stats.sequence.cpu(), (stats.cross_entropy * stats.mask).double().cpu()
    )
    tokens = torch.zeros(shape, dtype=torch.float64).index_add_(0, stats.sequence.cpu(), stats.mask.double().cpu())
    return torch.where(tokens > 0, total / tokens.clamp(min=1), torch.inf).to(stats.cross_entropy.device)


def udf(stats: TeacherStats, options: Any) -> Tensor:
    """InfiFusion eq. 5: ``w_k = 1 / (H(P^k) + CE(y, P^k) + epsilon)`` at every token, normalised over the usable teachers."""
    score = stats.mask / (stats.entropy + stats.cross_entropy + options.epsilon)
    return score / score.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)


TARGETS: dict[str, Callable[[TeacherStats, Any], Tensor]] = {"kd": kd, "naive": naive, "mince": mince, "udf": udf}
