"""What is told of every row of a teacher cache: from states through the saved head, over the whole vocabulary, at temperature 1."""

import torch
from torch import Tensor

STATISTICS = ("label_logprob", "entropy", "logsumexp")


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, known: int, chunk: int = 512, top: int = 0
) -> dict[str, Tensor]:
    """Label log-prob, entropy and logsumexp (N,) fp32, of ``hidden (N, d)`` through a head ``(V, d)``, first ``known`` rows only.

    With ``top`` also that many most likely tokens: ``top_id (N, top)`` int32, ``top_logprob (N, top)``, and the mass of the others, ``tail (N,)``.
    """
    out: dict[str, list[Tensor]] = {
        name: [] for name in (*STATISTICS, *(("top_id", "top_logprob", "tail") if top else ()))
    }
    weight, bias = weight[:known].float(), None if bias is None else bias[:known].float()
    for start in range(0, len(hidden), chunk):
        logits = torch.nn.functional.linear(hidden[start : start + chunk].float(), weight, bias)  # (c, V)
        total = logits.logsumexp(-1)
        log_q = logits - total[:, None]
        out["label_logprob"].append(log_q.gather(1, labels[start : start + chunk, None].long())[:, 0])
        q = log_q.exp()
        out["entropy"].append(-(q * log_q).sum(-1))
        out["logsumexp"].append(total)
        if top:
            values, ids = log_q.topk(top)
            for name, found in {
                "top_id": ids.int(),
                "top_logprob": values,
                "tail": q.scatter(1, ids, 0.0).sum(-1),
            }.items():
                out[name].append(found)
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in out.items()}
