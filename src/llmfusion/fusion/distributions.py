"""What a teacher of the student's vocabulary says at N rows (:class:`~llmfusion.fusion.fused_loss.TeacherDistribution`): exactly, or its most likely tokens."""

import torch
from torch import Tensor

from llmfusion.errors import UserError
from llmfusion.fusion.head import head_logits, log_softmax_


class Vocabulary:
    """A teacher's head ``(V_teacher, d)`` and bias, cut or filled up to the student's ``rows``; ``shared`` are the ids of the tokens that are
    the same in both, ``others`` all else that has a row."""

    def __init__(self, head: Tensor, bias: Tensor | None, shared: Tensor, rows: int):
        self.head = _of_length(head, rows)
        self.bias = None if bias is None else _of_length(bias, rows)
        self.shared, self.rows = shared, rows
        is_shared = torch.zeros(rows, dtype=torch.bool, device=head.device)
        is_shared[shared] = True
        self.others = (~is_shared).nonzero()[:, 0]


def _of_length(tensor: Tensor, rows: int) -> Tensor:
    """Its first rows; where there are fewer, rows of zeros behind them."""
    missing = rows - len(tensor)
    return tensor[:rows] if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class HiddenStateDistribution:
    """Hidden states times the teacher's head: exact distributions, recomputed when they are needed.

    ``is_own_entropy``: whether ``entropy (N,)`` was taken from these very states.
    """

    def __init__(
        self,
        hidden: Tensor,
        own: Vocabulary,
        entropy: Tensor,
        cross_entropy: Tensor,
        mask: Tensor,
        is_own_entropy: bool = True,
    ):
        self.hidden, self.own, self.is_own_entropy = hidden, own, is_own_entropy
        self.entropy, self.cross_entropy, self.mask = entropy, cross_entropy, mask

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``: softmax over the shared tokens only; the others get -inf, never a zero logit."""
        own = self.own
        logits = head_logits(self.hidden[rows], own.head, own.bias)
        if len(own.others):
            logits.index_fill_(1, own.others, -torch.inf)
        return log_softmax_(logits, temperature)


class TopKDistribution:
    """The k most likely tokens of each row, renormalised: all others are impossible (FuseLLM). Known at temperature 1 only.

    Tokens that the student lacks are left out of the k; a row without any other is masked.
    """

    is_own_entropy = False  # it is the whole distribution's

    def __init__(
        self, ids: Tensor, log_probs: Tensor, own: Vocabulary, entropy: Tensor, cross_entropy: Tensor, mask: Tensor
    ):
        known = torch.isin(ids, own.shared)  # (N, k)
        self.ids, self.rows = torch.where(known, ids, own.rows).long(), own.rows
        kept = log_probs.masked_fill(~known, -torch.inf)
        self.values = torch.where(known, kept - kept.logsumexp(-1, keepdim=True), -torch.inf)  # (N, k)
        self.entropy, self.cross_entropy, self.mask = entropy, cross_entropy, mask * known.any(-1)

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``, -inf outside the k. Raises :class:`UserError` at another temperature than 1."""
        if temperature != 1:
            raise UserError(
                f"temperature {temperature}: a teacher cached with kind topk is known at temperature 1 only"
            )
        ids, values = self.ids[rows], self.values[rows]
        out = values.new_full((len(values), self.rows + 1), -torch.inf)  # the last place takes what the student lacks
        return out.scatter_(1, ids, values)[:, :-1]
