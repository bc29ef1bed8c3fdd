"""What a teacher of the student's vocabulary says at N rows (:class:`~llmfusion.fusion.losses.TeacherRows`): exactly, or its most likely tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmfusion.errors import UserError
from llmfusion.fusion.products import head_logits, log_softmax_


@dataclass(frozen=True)
class Vocabulary:
    """A teacher's head ``(V_teacher, d)`` and bias, the ids of the tokens it ``shared`` with the student, and the student's rows."""

    head: Tensor
    bias: Tensor | None
    shared: Tensor
    rows: int

    @property
    def same_rows(self) -> bool:
        """Whether there is nothing to leave out or to fill up."""
        return len(self.shared) == self.rows == len(self.head)


class HiddenRows:
    """Hidden states times the teacher's head: exact distributions, recomputed when they are needed."""

    def __init__(self, hidden: Tensor, own: Vocabulary, entropy: Tensor, cross_entropy: Tensor, mask: Tensor):
        self.hidden, self.own = hidden, own
        self.entropy, self.cross_entropy, self.mask = entropy, cross_entropy, mask

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``: softmax over the shared tokens only; the others get -inf, never a zero logit."""
        own = self.own
        logits = head_logits(self.hidden[rows], own.head, own.bias)  # (c, V_teacher)
        if own.same_rows:
            return log_softmax_(logits, temperature)
        shared = log_softmax_(logits[:, own.shared], temperature)
        out = shared.new_full((len(shared), own.rows), -torch.inf)
        out[:, own.shared] = shared
        return out


class TopRows:
    """The k most likely tokens of each row, renormalised: all others are impossible (FuseLLM). Known at temperature 1 only.

    Tokens that the student lacks are left out of the k; a row without any other is masked.
    """

    def __init__(self, ids: Tensor, log_probs: Tensor, own: Vocabulary, entropy: Tensor, cross_entropy: Tensor, mask: Tensor):
        known = torch.isin(ids, own.shared)  # (N, k)
        self.ids, self.rows = torch.where(known, ids, own.rows).long(), own.rows
        kept = log_probs.masked_fill(~known, -torch.inf)
        self.values = torch.where(known, kept - kept.logsumexp(-1, keepdim=True), -torch.inf)  # (N, k)
        self.entropy, self.cross_entropy, self.mask = entropy, cross_entropy, mask * known.any(-1)

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)``, -inf outside the k. Raises :class:`UserError` at another temperature than 1."""
        if temperature != 1:
            raise UserError(f"temperature {temperature}: a teacher cached with kind topk is known at temperature 1 only")
        ids, values = self.ids[rows], self.values[rows]
        out = values.new_full((len(values), self.rows + 1), -torch.inf)  # the last place takes what the student lacks
        return out.scatter_(1, ids, values)[:, :-1]
