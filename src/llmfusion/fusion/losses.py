"""The fused loss: a linear head followed by softmax cross-entropy to labels and KL to weighted teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from llmfusion.fusion.divergences import Divergence, forward_kl


class TeacherRows(Protocol):
    """One teacher's view of the N label tokens of a batch."""

    entropy: Tensor  # (N,) nats
    cross_entropy: Tensor  # (N,) nats, of the label
    mask: Tensor  # (N,) 1 where the teacher can be used

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        """``(c, V)`` log-probabilities over the student's vocabulary, -inf for tokens the teacher does not know."""
        ...


@dataclass(frozen=True)
class FusedLoss:
    """``loss`` is the sum over tokens, with its gradient; the others are for the record and carry none.

    ``sft`` and ``fusion`` are the two terms' sums before lambda; ``cross_entropy (N, K)`` is X_tk = CE(P^k_T, p_T).
    """

    loss: Tensor
    sft: Tensor
    fusion: Tensor
    cross_entropy: Tensor


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teachers: Sequence[TeacherRows] = (),
    weights: Tensor | None = None,
    lam: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
) -> FusedLoss:
    """``sum_t (1 - lam) CE(y_t, p) + lam sum_k w_tk D(P^k_T, p_T)``, p = softmax(hidden head^T + bias), in float32.

    ``hidden (N, d)`` are the student's final states at the positions that predict ``labels (N,)``, ``head (V, d)``,
    ``weights (N, K)`` from a target (:mod:`llmfusion.fusion.targets`; InfiFusion eq. 7). The temperature
    softens both sides of D only, without a factor T^2; D is KL(P || p) or another of :mod:`llmfusion.fusion.divergences`. Divide
    by the global count of label tokens to get the mean.
    """
    logits = functional.linear(hidden, head, bias).float()  # (N, V)
    sft = functional.cross_entropy(logits, labels, reduction="sum")
    if not teachers or weights is None:
        return FusedLoss((1 - lam) * sft, sft.detach(), torch.zeros_like(sft), logits.new_zeros(len(labels), 0))
    log_p = functional.log_softmax(logits / temperature, dim=-1)
    fusion = logits.new_zeros(())
    crosses = []
    for k, teacher in enumerate(teachers):
        log_q = teacher.log_probs(slice(0, len(labels)), temperature)  # (N, V)
        fusion = fusion + (weights[:, k] * divergence(log_q, log_p)).sum()
        crosses.append(-(log_q.exp() * log_p.detach()).sum(-1))
    return FusedLoss((1 - lam) * sft + lam * fusion, sft.detach(), fusion.detach(), torch.stack(crosses, 1))
