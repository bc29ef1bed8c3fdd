"""The fused loss: a linear head followed by softmax cross-entropy to labels and divergences from weighted teachers.

The (N, V) logits never exist at once: rows go through the head in chunks, and each chunk's gradient is taken in closed form. With
p = softmax(z), p_T = softmax(z / T) and s_t = sum_k w_tk, for the forward KL:

    L_t = (1 - lam) CE(y_t, p) + lam sum_k w_tk KL(P^k_T || p_T)
    dL_t/dz = (1 - lam) (p - onehot(y_t)) + lam / T (s_t p_T - sum_k w_tk P^k_T)

No graph is kept and nothing is computed twice. Products are taken over a chunk; what follows goes through it in tiles that stay
in a processor's cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmfusion.fusion.divergences import Divergence, forward_kl
from llmfusion.fusion.head import accum_dtype, add_matmul, chunk_for, log_softmax_, matmul

TILE = 2**17  # values: half a MiB in float32, of which five are used at a time
IGNORED = -100  # the label of a row that takes no part


class TeacherDistribution(Protocol):
    """One teacher's view of the N label tokens of a batch. Where ``entropy`` is that of ``log_probs`` at temperature 1 (``is_own_entropy``), the
    loss need not take it again."""

    entropy: Tensor  # (N,) nats
    cross_entropy: Tensor  # (N,) nats, of the label
    mask: Tensor  # (N,) 1 where the teacher can be used
    is_own_entropy: bool

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)`` log-probabilities over the student's vocabulary, -inf for tokens the teacher does not know; nobody else's memory."""
        ...


@dataclass(frozen=True)
class FusedLoss:
    """``loss`` is the sum over rows, with its gradient; the others are for the record and carry none.

    ``sft`` and ``fusion`` are the two terms' sums before lambda, ``cross_entropy (N, K)`` is X_tk = CE(P^k_T, p_T): where a term is
    w_tk X_tk, its derivative by the weight. ``said (N, 3)`` describes p: its entropy, -log p(y), and 1 where y is its most likely
    token. Rows that are ignored have 0, and so has X where a weight is 0 and needs no gradient.
    """

    loss: Tensor
    sft: Tensor
    fusion: Tensor
    cross_entropy: Tensor
    said: Tensor


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teachers: Sequence[TeacherDistribution] = (),
    weights: Tensor | None = None,
    lam: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    chunk: int | None = None,
    count: float = 1.0,
    products: torch.dtype | None = None,
    describe: bool = False,
) -> FusedLoss:
    """``1 / count sum_t (1 - lam) CE(y_t, p) + lam sum_k w_tk D(P^k_T, p_T)``, p = softmax(hidden head^T + bias).

    ``hidden (N, d)`` are the student's final states at the positions that predict ``labels (N,)``, ``head (V, d)``, ``bias (V,)``,
    ``weights (N, K)`` from a target (:mod:`llmfusion.fusion.targets`; InfiFusion eq. 7). The temperature softens both sides of D
    only, without a factor T^2; D is KL(P || p) or another of :mod:`llmfusion.fusion.divergences`. Without teachers it is SFT
    alone. Rows labelled -100 are left out before anything is computed. Differentiable in hidden, head, bias and weights, once.

    ``count`` divides loss and gradients (the global count of label tokens makes them means) and nothing else. All is computed in
    float32, or in float64 where hidden is; ``products: torch.bfloat16`` rounds what the head is multiplied with. ``said`` is
    filled where ``describe`` asks for it. Memory beyond results: 3 buffers of ``chunk`` x V values.
    """
    if not teachers or weights is None:
        teachers, weights = (), hidden.new_zeros(len(labels), 0)
    chunk = min(chunk or chunk_for(head), max(len(labels), 1))
    terms = _Terms(
        labels, list(teachers), lam, temperature, divergence, chunk, count, products or accum_dtype(hidden), describe
    )
    return FusedLoss(*_Fused.apply(hidden, head, bias, weights, terms))


@dataclass(frozen=True)
class _Terms:
    """What the loss is made of besides the tensors it has gradients for."""

    labels: Tensor
    teachers: list[TeacherDistribution]
    lam: float
    temperature: float
    divergence: Divergence
    chunk: int
    count: float
    products: torch.dtype
    describe: bool

    def rows(self) -> list[slice | Tensor]:
        """The rows that count, in chunks."""
        counted = self.labels != IGNORED
        if bool(counted.all()):
            return [
                slice(start, min(start + self.chunk, len(self.labels)))
                for start in range(0, len(self.labels), self.chunk)
            ]
        return [part for part in counted.nonzero()[:, 0].split(self.chunk) if len(part)]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, weights: Tensor, terms: _Terms
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad
        computation = _FusedLossComputation(hidden, head, bias, weights, terms, wanted)
        for rows in terms.rows():
            computation.add(rows)
        ctx.save_for_backward(
            *(g if needed else None for g, needed in zip(computation.gradients, wanted, strict=False))
        )
        out = (
            computation.loss / terms.count,
            computation.sft,
            computation.fusion,
            computation.cross_entropy,
            computation.said,
        )
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outward: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if bool(
            outward == 1
        ):  # as a trainer calls it: the head's gradient is large, a copy of it would be another head
            return (*ctx.saved_tensors, None)
        return (*(None if g is None else outward * g for g in ctx.saved_tensors), None)


class _FusedLossComputation:
    """One pass over the rows: the sums, and the gradients of those inputs that need one."""

    def __init__(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, weights: Tensor, terms: _Terms, wanted: Sequence[bool]
    ):
        dtype = accum_dtype(hidden)
        self.hidden, self.head, self.weights, self.terms, self.wanted = (
            hidden,
            head.to(terms.products),
            weights.to(dtype),
            terms,
            any(wanted),
        )
        self.bias = None if bias is None else bias.to(dtype)
        self.loss, self.sft, self.fusion = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(3))
        self.cross_entropy, self.said = (
            torch.zeros_like(self.weights),
            self.weights.new_zeros(len(hidden) if terms.describe else 0, 3),
        )
        inputs = (hidden, head, bias, weights)
        self.gradients = [
            None if x is None or not needed else torch.zeros_like(x) for x, needed in zip(inputs, wanted, strict=False)
        ]
        self.tile = terms.chunk if hidden.is_cuda else min(terms.chunk, max(1, TILE // len(head)))
        self.log_p, self.pull = (
            self.weights.new_empty(terms.chunk if used else 0, len(head)) for used in (True, self.wanted)
        )
        self.spare = self.weights.new_empty(self.tile, len(head))

    def add(self, rows: slice | Tensor) -> None:
        """The rows' part."""
        terms, labels = self.terms, self.terms.labels[rows, None]
        states, weights = self.hidden[rows].to(self.head.dtype), self.weights[rows]
        log_p = matmul(states, self.head.t(), out=self.log_p[: len(states)])  # (c, V)
        log_softmax_(log_p if self.bias is None else log_p.add_(self.bias))
        sft = -log_p.gather(1, labels).sum()
        if terms.describe:
            self.said[rows] = self._describe(log_p, labels)
        own, drawn = (
            1 - terms.lam,
            weights.sum(1, keepdim=True) * terms.lam / terms.temperature if terms.divergence is forward_kl else 0,
        )
        pull = self.pull[: len(states)]
        if terms.temperature == 1 or not terms.teachers:
            self._pull(log_p, pull, drawn + weights.new_full(labels.shape, own), first=True)
        else:
            self._pull(log_p, pull, weights.new_full(labels.shape, own), first=True)
            log_softmax_(log_p, terms.temperature)  # the same as of the logits: a constant in a row makes no difference
            self._pull(log_p, pull, drawn + weights.new_zeros(labels.shape), first=False)
        if self.wanted:
            pull.scatter_add_(1, labels, weights.new_full(labels.shape, -own))
        fusion = sum(
            (self._add_teacher(k, rows, log_p, pull) for k in range(len(terms.teachers))), start=sft.new_zeros(())
        )
        self.sft += sft
        self.fusion += fusion
        self.loss += own * sft + terms.lam * fusion
        if self.wanted:
            self._add_gradients(rows, states, pull)

    def _tiles(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``count`` rows, each with a buffer of its size."""
        for start in range(0, count, self.tile):
            rows = slice(start, min(start + self.tile, count))
            yield rows, self.spare[: rows.stop - start]

    def _pull(self, log_p: Tensor, pull: Tensor, factor: Tensor, first: bool) -> None:
        """``pull (c, V) = factor (c, 1) p``, or added to it."""
        for rows, p in self._tiles(len(pull)):
            torch.exp(log_p[rows], out=p)
            if first:
                torch.mul(p, factor[rows], out=pull[rows])
            else:
                pull[rows].addcmul_(p, factor[rows])

    def _describe(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Entropy, cross-entropy and rightness, (c, 3)."""
        out = log_p.new_empty(len(log_p), 3)
        for rows, p in self._tiles(len(log_p)):
            torch.exp(log_p[rows], out=p)
            out[rows, 0] = -_dot(p, log_p[rows])
            out[rows, 2] = (log_p[rows].argmax(1) == labels[rows, 0]).to(out.dtype)
        out[:, 1] = -log_p.gather(1, labels)[:, 0]
        return out

    def _add_teacher(self, k: int, rows: slice | Tensor, log_p: Tensor, pull: Tensor) -> Tensor:
        """Sum of a teacher's weighted divergences; their gradient is added to ``pull``, but what is the same for all teachers."""
        terms, by_weight = self.terms, self.gradients[3]
        weight = self.weights[rows, k : k + 1]
        used = (
            slice(None) if by_weight is not None or bool((weight != 0).all()) else (weight[:, 0] != 0).nonzero()[:, 0]
        )
        number, weight = _numbers(rows, used), weight[used]
        if not len(weight):  # MinCE leaves a teacher without a row
            return weight.new_zeros(())
        teacher = terms.teachers[k]
        log_q = teacher.log_probs(number, terms.temperature)
        told = teacher.entropy[number].to(log_q.dtype) if teacher.is_own_entropy and terms.temperature == 1 else None
        cross, apart = weight.new_empty(len(weight)), weight.new_empty(len(weight))
        for some, q in self._tiles(len(weight)):
            at = some if isinstance(used, slice) else used[some]
            if terms.divergence is forward_kl:
                cross[some], apart[some] = self._forward(
                    log_q[some], log_p[at], q, None if told is None else told[some]
                )
            else:
                cross[some], apart[some] = self._other(log_q[some], log_p[at], q)
            if self.wanted:
                _subtract(pull, at, q, weight[some] * (terms.lam / terms.temperature))
        self.cross_entropy[number, k] = cross
        if by_weight is not None:
            by_weight[number, k] = (terms.lam / terms.count * apart).to(by_weight.dtype)
        return weight[:, 0] @ apart

    def _forward(self, log_q: Tensor, log_p: Tensor, q: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        """``CE(Q, p)`` and ``KL(Q || p)`` of a tile's rows, (r,); leaves Q in ``q``, which is what the gradient lacks."""
        cross = -_dot(torch.exp(log_q, out=q), log_p)
        if entropy is not None:
            return cross, cross - entropy
        own = _dot(q, log_q)
        if bool(own.isnan().any()):  # an unknown token is 0 x -inf
            own = _dot(q, log_q.clamp(min=torch.finfo(log_q.dtype).min))
        return cross, cross + own

    def _other(self, log_q: Tensor, log_p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """``CE(Q, p)`` and another divergence of a tile's rows, (r,); leaves minus its gradient by the logits in ``q``."""
        cross = -_dot(torch.exp(log_q, out=q), log_p)
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            apart = self.terms.divergence(log_q, leaf)
            (back,) = torch.autograd.grad(apart.sum(), leaf)
        torch.exp(log_p, out=q).mul_(back.sum(1, keepdim=True)).sub_(back)  # through the log-softmax
        return cross, apart.detach()

    def _add_gradients(self, rows: slice | Tensor, states: Tensor, pull: Tensor) -> None:
        """From dL/dz (c, V) to the inputs."""
        hidden, head, bias, _ = self.gradients
        if self.terms.count != 1:
            pull.div_(self.terms.count)
        if bias is not None:
            bias += pull.sum(0)
        pull = pull.to(self.head.dtype)
        if hidden is not None:
            hidden[rows] = matmul(pull, self.head).to(hidden.dtype)
        if head is not None:
            add_matmul(head, pull.t(), states)


def _numbers(rows: slice | Tensor, used: slice | Tensor) -> slice | Tensor:
    """The batch's numbers of a chunk's used rows."""
    if isinstance(used, slice):
        return rows
    return used + rows.start if isinstance(rows, slice) else rows[used]


def _subtract(pull: Tensor, at: slice | Tensor, q: Tensor, weight: Tensor) -> None:
    """``pull[at] -= weight q``; ``q`` may be overwritten."""
    if isinstance(at, slice):
        pull[at].addcmul_(q, weight, value=-1)
    else:
        pull.index_add_(0, at, q.mul_(weight), alpha=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (r,)."""
    return torch.linalg.vecdot(a, b)
