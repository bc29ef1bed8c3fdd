"""The fused loss: a linear head followed by softmax cross-entropy to labels and divergences from weighted teachers.

The (N, V) logits never exist at once: rows go through the head in chunks, and each chunk's gradient is taken in closed form. With
p = softmax(z), p_T = softmax(z / T) and s_t = sum_k w_tk, for the forward KL:

    L_t = (1 - lam) CE(y_t, p) + lam sum_k w_tk KL(P^k_T || p_T)
    dL_t/dz = (1 - lam) (p - onehot(y_t)) + lam / T (s_t p_T - sum_k w_tk P^k_T)

No graph is kept and nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llmfusion.fusion.divergences import Divergence, forward_kl

LOGITS = 2**25  # values of (c, V) logits in one buffer: 128 MiB in float32, 256 rows of a vocabulary of 128K
IGNORED = -100  # the label of a row that takes no part


def chunk_for(head: Tensor) -> int:
    """How many rows to take at once through a head ``(V, .)``."""
    return max(1, LOGITS // len(head))


class TeacherRows(Protocol):
    """One teacher's view of the N label tokens of a batch."""

    entropy: Tensor  # (N,) nats
    cross_entropy: Tensor  # (N,) nats, of the label
    mask: Tensor  # (N,) 1 where the teacher can be used

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)`` log-probabilities over the student's vocabulary, -inf for tokens the teacher does not know; nobody else's memory."""
        ...


@dataclass(frozen=True)
class FusedLoss:
    """``loss`` is the sum over rows, with its gradient; the others are for the record and carry none.

    ``sft`` and ``fusion`` are the two terms' sums before lambda, ``cross_entropy (N, K)`` is X_tk = CE(P^k_T, p_T): where a term is
    w_tk X_tk, its derivative by the weight. Rows that are ignored have 0.
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
    chunk: int | None = None,
) -> FusedLoss:
    """``sum_t (1 - lam) CE(y_t, p) + lam sum_k w_tk D(P^k_T, p_T)``, p = softmax(hidden head^T + bias), in float32 or float64.

    ``hidden (N, d)`` are the student's final states at the positions that predict ``labels (N,)``, ``head (V, d)``, ``bias (V,)``,
    ``weights (N, K)`` from a target (:mod:`llmfusion.fusion.targets`; InfiFusion eq. 7). The temperature softens both sides of D
    only, without a factor T^2; D is KL(P || p) or another of :mod:`llmfusion.fusion.divergences`. Without teachers it is SFT
    alone. Rows labelled -100 are left out before anything is computed. Differentiable in hidden, head, bias and weights, once. Memory beyond
    its results: 3 to 5 buffers of ``chunk`` x V values. Divide by the global count of label tokens to get the mean.
    """
    if not teachers or weights is None:
        teachers, weights = (), hidden.new_zeros(len(labels), 0)
    terms = _Terms(labels, list(teachers), lam, temperature, divergence, chunk or chunk_for(head))
    loss, sft, fusion, cross_entropy = _Fused.apply(hidden, head, bias, weights, terms)
    return FusedLoss(loss, sft, fusion, cross_entropy)


@dataclass(frozen=True)
class _Terms:
    """What the loss is made of besides the tensors it has gradients for."""

    labels: Tensor
    teachers: list[TeacherRows]
    lam: float
    temperature: float
    divergence: Divergence
    chunk: int

    def rows(self) -> list[slice | Tensor]:
        """The rows that count, in chunks."""
        counted = self.labels != IGNORED
        if bool(counted.all()):
            return [slice(start, start + self.chunk) for start in range(0, len(self.labels), self.chunk)]
        return list(counted.nonzero()[:, 0].split(self.chunk))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, weights: Tensor, terms: _Terms) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad
        pass_ = _Pass(hidden, head, bias, weights, terms, wanted)
        for rows in terms.rows():
            pass_.add(rows)
        ctx.save_for_backward(*(g if needed else None for g, needed in zip(pass_.gradients, wanted, strict=False)))
        out = pass_.loss, pass_.sft, pass_.fusion, pass_.cross_entropy
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outward: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else outward * g for g in ctx.saved_tensors), None)


class _Pass:
    """One pass over the rows: the sums, and the gradients of those inputs that need one."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, weights: Tensor, terms: _Terms, wanted: Sequence[bool]):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.head, self.weights, self.terms, self.wanted = hidden, head.to(exact), weights.to(exact), terms, wanted
        self.bias = None if bias is None else bias.to(exact)
        self.loss, self.sft, self.fusion = (torch.zeros((), dtype=exact, device=hidden.device) for _ in range(3))
        self.cross_entropy = torch.zeros_like(self.weights)
        inputs = (hidden, head, bias, weights)
        self.gradients = [None if x is None or not needed else torch.zeros_like(x) for x, needed in zip(inputs, wanted, strict=False)]

    def add(self, rows: slice | Tensor) -> None:
        """The rows' part: three matrix products at most, the rest in place on (c, V) buffers."""
        terms, lam, temperature = self.terms, self.terms.lam, self.terms.temperature
        states, labels = self.hidden[rows].to(self.head.dtype), terms.labels[rows, None]
        logits = functional.linear(states, self.head, self.bias)  # (c, V)
        log_p = functional.log_softmax(logits, dim=-1)
        sft = -log_p.gather(1, labels).sum()
        if not any(self.wanted):
            pull = None
        else:
            pull = log_p.exp().mul_(1 - lam)
            pull.scatter_add_(1, labels, pull.new_full(labels.shape, lam - 1))
        if terms.teachers:
            if temperature != 1:
                log_p = functional.log_softmax(logits.div_(temperature), dim=-1)
            fusion = self._add_teachers(rows, log_p, logits, pull)
            self.fusion += fusion
            self.loss += lam * fusion
        self.sft += sft
        self.loss += (1 - lam) * sft
        if pull is not None:
            self._add_gradients(rows, states, pull)

    def _add_teachers(self, rows: slice | Tensor, log_p: Tensor, spare: Tensor, pull: Tensor | None) -> Tensor:
        """Sum of the teachers' weighted divergences; their gradient is added to ``pull``, and ``spare`` is overwritten."""
        terms, weights = self.terms, self.weights[rows]  # (c, K)
        factor, fusion = terms.lam / terms.temperature, log_p.new_zeros(())
        closed = terms.divergence is forward_kl
        if closed and pull is not None:
            pull.addcmul_(torch.exp(log_p, out=spare), weights.sum(1, keepdim=True), value=factor)
        for k, teacher in enumerate(terms.teachers):
            log_q, weight = teacher.log_probs(rows, terms.temperature), weights[:, k]
            q = torch.exp(log_q, out=spare) if closed else log_q.exp()
            self.cross_entropy[rows, k] = cross = -_dot(q, log_p)
            if closed:
                apart = cross + _dot(q, log_q.clamp_(min=torch.finfo(log_q.dtype).min))  # an unknown token is 0 x -inf
            else:
                with torch.enable_grad():
                    leaf = log_p.detach().requires_grad_(pull is not None)
                    apart = terms.divergence(log_q, leaf)
                    total = apart.sum()
                if pull is not None:
                    (back,) = torch.autograd.grad(total, leaf)
                    q = back.sub_(log_p.exp().mul_(back.sum(-1, keepdim=True))).neg_()  # through the log-softmax
                apart = apart.detach()
            if pull is not None:
                pull.addcmul_(q, weight[:, None], value=-factor)
            if self.gradients[3] is not None:
                self.gradients[3][rows, k] = terms.lam * apart
            fusion += weight @ apart
        return fusion

    def _add_gradients(self, rows: slice | Tensor, states: Tensor, pull: Tensor) -> None:
        """From dL/dz (c, V) to the inputs."""
        hidden, head, bias, _ = self.gradients
        if hidden is not None:
            hidden[rows] = (pull @ self.head).to(hidden.dtype)
        if head is not None:
            head.addmm_(pull.t().to(head.dtype), states.to(head.dtype))
        if bias is not None:
            bias += pull.sum(0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (c,), without a (c, V) product between."""
    return torch.linalg.vecdot(a, b)
