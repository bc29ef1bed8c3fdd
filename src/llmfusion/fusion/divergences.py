"""Divergences between a teacher's distribution q and the student's p, token by token.

InfiFusion, "Combining Supervised and Fusion Losses". All take log-probabilities ``log_q``, ``log_p`` of shape (c, V),
both already softened if there is a temperature, and return (c,) in nats, differentiable in ``log_p``. ``log_p`` is
finite. ``log_q`` is -inf for tokens that the teacher does not know:

- ``forward_kl`` counts them as impossible: the student's mass on them makes it larger.
- ``reverse_kl`` would be infinite there, so it compares p renormalised over the tokens the teacher knows. The student's
  mass on the others is left to the other terms of the loss. ``js`` does the same: both directions compare the same two
  distributions.

A row without any known token is 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || p) = sum_v q (log q - log p)``, (c,)."""
    known = torch.isfinite(log_q)
    return (log_q.exp() * (log_q.masked_fill(~known, 0) - log_p)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(p' || q) = sum_v p' (log p' - log q)``, (c,), with p' = p renormalised over the tokens q knows."""
    log_q, log_p, known = _shared(log_q, log_p)
    return (known * log_p.exp() * (log_p - log_q)).sum(-1)


def js(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || m) / 2 + KL(p' || m) / 2`` with m = (q + p') / 2, (c,), at most log 2; p' as in :func:`reverse_kl`."""
    log_q, log_p, known = _shared(log_q, log_p)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return (known * (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m))).sum(-1) / 2


def _shared(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``log_q`` and ``log_p'``, finite everywhere, and the tokens that q knows, (c, V) each."""
    known = torch.isfinite(log_q)
    included = known | ~known.any(-1, keepdim=True)  # a row without known tokens: any finite number will do
    total = log_p.masked_fill(~included, -torch.inf).logsumexp(-1, keepdim=True)
    return log_q.masked_fill(~known, 0), (log_p - total).masked_fill(~known, 0), known


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js}
