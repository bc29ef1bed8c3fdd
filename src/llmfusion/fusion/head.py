"""Matrix products with a head, and what follows them at once, with a float32 or float64 result.

Inputs may be 16-bit: a GPU multiplies them as they are and adds up in float32; elsewhere the product itself is rounded.
"""

import torch
from torch import Tensor

CHUNK_VALUES = 2**22  # values of (c, V) logits taken at once: a small vocabulary goes through in few chunks
CHUNK_ROWS = (
    192  # rows taken at once of a large vocabulary; fewer make reading and writing the head's gradient expensive
)
CHUNK_ROWS_GPU = 1024


def chunk_rows(head: Tensor) -> int:
    """How many rows to take at once through a head ``(V, .)``."""
    return max(CHUNK_ROWS_GPU if head.is_cuda else CHUNK_ROWS, CHUNK_VALUES // len(head))


def accum_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over a tensor's values are taken in: float64 of float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(accum_dtype(tensor))


def head_for_device(weight: Tensor, device: str) -> Tensor:
    """A teacher's head as it is multiplied: as stored on a GPU, which adds up in float32; elsewhere in float32."""
    return weight.to(device) if torch.device(device).type == "cuda" else upcast(weight).to(device)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a (m, k) @ b (k, n)`` in float32, or float64 where both are; into ``out`` where it is given."""
    if a.dtype == accum_dtype(a):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return (
            torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, out_dtype=torch.float32, out=out)
        )
    return torch.mm(a, b).float() if out is None else out.copy_(torch.mm(a, b))


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total (m, n) += a (m, k) @ b (k, n)``, ``total`` in its own precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += matmul(a, b)


def log_softmax_(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` of each row, in the memory of ``logits (c, V)``."""
    if temperature != 1:
        logits.div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)


@torch.no_grad()
def head_logits(states: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """``states (c, d)`` through ``head (V, d)`` and ``bias (V,)``: (c, V) in new memory, without a gradient."""
    logits = matmul(states.to(head.dtype), head.t())
    return logits if bias is None else logits.add_(bias)


def head_log_probs(states: Tensor, head: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """``log softmax((states head^T + bias) / temperature)``, (c, V); see :func:`head_logits`."""
    return log_softmax_(head_logits(states, head, bias), temperature)
