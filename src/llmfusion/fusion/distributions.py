"""Distributions of a teacher of the student's vocabulary at N rows: exact, or its k most likely tokens.

Both implement :class:`~llmfusion.fusion.fused_loss.TeacherDistribution`.
"""

import torch
from torch import Tensor

from llmfusion.errors import UserError
from llmfusion.fusion.head import head_logits, log_softmax_


class TeacherHead:
    """A teacher's head ``(V_teacher, d)`` and bias, cut or padded to the ``vocabulary_size`` rows of the student's.

    ``shared`` are the ids of the tokens that are the same in both, ``unshared`` all other ids below
    ``vocabulary_size``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: Tensor, vocabulary_size: int):
        self.weight = _with_length(weight, vocabulary_size)
        self.bias = None if bias is None else _with_length(bias, vocabulary_size)
        self.shared = shared
        self.vocabulary_size = vocabulary_size
        is_shared = torch.zeros(vocabulary_size, dtype=torch.bool, device=weight.device)
        is_shared[shared] = True
        self.unshared = (~is_shared).nonzero()[:, 0]


def _with_length(tensor: Tensor, length: int) -> Tensor:
    """Its first rows; where there are fewer, rows of zeros behind them."""
    missing = length - len(tensor)
    return tensor[:length] if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class HiddenStateDistribution:
    """Hidden states ``(N, d)`` times the teacher's head: exact distributions, recomputed when they are needed.

    ``entropy``, ``cross_entropy`` and ``mask`` (N,) each; ``is_own_entropy``: whether ``entropy`` was taken from these
    very states.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: TeacherHead,
        entropy: Tensor,
        cross_entropy: Tensor,
        mask: Tensor,
        is_own_entropy: bool = True,
    ):
        self.hidden = hidden
        self.head = head
        self.entropy = entropy
        self.cross_entropy = cross_entropy
        self.mask = mask
        self.is_own_entropy = is_own_entropy

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``: softmax over the shared tokens only; the others get -inf, never a zero logit."""
        head = self.head
        logits = head_logits(self.hidden[rows], head.weight, head.bias)
        if len(head.unshared):
            logits.index_fill_(1, head.unshared, -torch.inf)
        return log_softmax_(logits, temperature)


class TopKDistribution:
    """The k most likely tokens of each row, renormalised: all others are impossible (FuseLLM). Temperature 1 only.

    ``ids`` and ``log_probs`` (N, k). Tokens that the student lacks are left out of the k; a row without any other is
    masked.
    """

    is_own_entropy = False  # it is the whole distribution's

    def __init__(
        self, ids: Tensor, log_probs: Tensor, head: TeacherHead, entropy: Tensor, cross_entropy: Tensor, mask: Tensor
    ):
        known = torch.isin(ids, head.shared)  # (N, k)
        self.vocabulary_size = head.vocabulary_size
        self.ids = torch.where(known, ids, head.vocabulary_size).long()
        kept = log_probs.masked_fill(~known, -torch.inf)
        self.values = torch.where(known, kept - kept.logsumexp(-1, keepdim=True), -torch.inf)  # (N, k)
        self.entropy = entropy
        self.cross_entropy = cross_entropy
        self.mask = mask * known.any(-1)

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``, -inf outside the k. Raises :class:`UserError` at another temperature than 1."""
        if temperature != 1:
            raise UserError(
                f"temperature {temperature}: a teacher cached with kind topk is known at temperature 1 only"
            )
        values = self.values[rows]
        out = values.new_full((len(values), self.vocabulary_size + 1), -torch.inf)
        return out.scatter_(1, self.ids[rows], values)[:, :-1]  # the last column takes what the student lacks
