"""Statistics of teacher cache rows: of states through the saved head, over the whole vocabulary, at temperature 1."""

import torch
from torch import Tensor

STATISTICS = ("label_logprob", "entropy", "logsumexp")
TOP_K = ("top_id", "top_logprob", "tail")


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head_rows: int,
    rows_at_once: int = 512,
    top_k: int = 0,
) -> dict[str, Tensor]:
    """Label log-prob, entropy and logsumexp in nats, (N,) fp32 each, of ``hidden (N, d)`` through a head ``(V, d)``.

    Only the head's first ``head_rows`` rows count: those behind them belong to no token. With ``top_k`` also that many
    most likely tokens: ``top_id (N, k)`` int32, ``top_logprob (N, k)``, and the mass of all others, ``tail (N,)``.
    """
    weight = weight[:head_rows].float()
    bias = None if bias is None else bias[:head_rows].float()
    names = (*STATISTICS, *TOP_K) if top_k else STATISTICS
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(hidden), rows_at_once):
        rows = slice(start, start + rows_at_once)
        logits = torch.nn.functional.linear(hidden[rows].float(), weight, bias)  # (c, V)
        for name, values in _statistics_of(logits, labels[rows], top_k).items():
            parts[name].append(values)
    return {name: torch.cat(values) if values else torch.zeros(0) for name, values in parts.items()}


def _statistics_of(logits: Tensor, labels: Tensor, top_k: int) -> dict[str, Tensor]:
    """The same of ``logits (c, V)`` and ``labels (c,)``."""
    logsumexp = logits.logsumexp(-1)  # (c,)
    log_q = logits - logsumexp[:, None]
    label_logprob = log_q.gather(1, labels[:, None].long())[:, 0]  # (c,)
    q = log_q.exp()
    of_rows = {"label_logprob": label_logprob, "entropy": -(q * log_q).sum(-1), "logsumexp": logsumexp}
    if top_k:
        values, ids = log_q.topk(top_k)  # (c, k)
        of_rows |= {"top_id": ids.int(), "top_logprob": values, "tail": q.scatter(1, ids, 0.0).sum(-1)}
    return of_rows
