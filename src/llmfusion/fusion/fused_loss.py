"""The fused loss: a linear head followed by softmax cross-entropy to labels and divergences from weighted teachers.

The (N, V) logits never exist at once: rows go through the head in chunks, and each chunk's gradient is taken in closed
form. With p = softmax(z), p_T = softmax(z / T), s_t = sum_k w_tk and lambda = ``fusion_weight``, for the forward KL:

    L_t = (1 - lambda) CE(y_t, p) + lambda sum_k w_tk KL(P^k_T || p_T)
    dL_t/dz = (1 - lambda) (p - onehot(y_t)) + lambda / T (s_t p_T - sum_k w_tk P^k_T)

No graph is kept and nothing is computed twice. Products are taken over a chunk; what follows goes through it in tiles
that stay in a processor's cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmfusion.fusion.divergences import Divergence, forward_kl
from llmfusion.fusion.head import accum_dtype, add_matmul, chunk_rows, log_softmax_, matmul

TILE_VALUES = 2**17  # half a MiB in float32, of which five are used at a time
IGNORED = -100  # the label of a row that takes no part


class TeacherDistribution(Protocol):
    """One teacher's distributions at the N label tokens of a batch.

    Where ``entropy`` is that of ``log_probs`` at temperature 1 (``is_own_entropy``), the loss need not compute it
    again.
    """

    entropy: Tensor  # (N,) nats
    cross_entropy: Tensor  # (N,) nats, of the label
    mask: Tensor  # (N,) 1 where the teacher can be used
    is_own_entropy: bool

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, V)`` log-probabilities over the student's vocabulary, -inf for tokens the teacher does not know.

        The tensor is new: the caller may overwrite it.
        """
        ...


@dataclass(frozen=True)
class FusedLoss:
    """``loss`` is the sum over rows, with its gradient; the others are for the record and carry none.

    ``sft`` and ``fusion`` are the two terms' sums before lambda, ``cross_entropy (N, K)`` is X_tk = CE(P^k_T, p_T):
    where a term is w_tk X_tk, its derivative by the weight. ``student_stats (N, 3)``: the entropy of p, -log p(y), and
    1 where y is the most likely token. Rows that are ignored have 0, and so has X where a weight is 0 and needs no
    gradient.
    """

    loss: Tensor
    sft: Tensor
    fusion: Tensor
    cross_entropy: Tensor
    student_stats: Tensor


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teachers: Sequence[TeacherDistribution] = (),
    weights: Tensor | None = None,
    fusion_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    chunk: int | None = None,
    count: float = 1.0,
    matmul_dtype: torch.dtype | None = None,
    with_student_stats: bool = False,
) -> FusedLoss:
    """``1 / count sum_t (1 - lambda) CE(y_t, p) + lambda sum_k w_tk D(P^k_T, p_T)``, p = softmax(hidden head^T + bias).

    ``hidden (N, d)`` are the student's final states at the positions that predict ``labels (N,)``, ``head (V, d)``,
    ``bias (V,)``, ``weights (N, K)`` from a target (:mod:`llmfusion.fusion.targets`; InfiFusion eq. 7), lambda =
    ``fusion_weight``. The temperature softens both sides of D only, without a factor T^2; D is KL(P || p) or another of
    :mod:`llmfusion.fusion.divergences`. Without teachers it is SFT alone. Rows labelled -100 are left out before
    anything is computed. Differentiable in hidden, head, bias and weights, once.

    ``count`` divides loss and gradients (the global count of label tokens makes them means) and nothing else. All is
    computed in float32, or in float64 where hidden is; ``matmul_dtype: torch.bfloat16`` rounds what the head is
    multiplied with. ``student_stats`` is filled where ``with_student_stats``. Memory beyond results: 3 buffers of
    ``chunk`` x V values.
    """
    if not teachers or weights is None:
        teachers = ()
        weights = hidden.new_zeros(len(labels), 0)
    settings = _LossSettings(
        labels=labels,
        teachers=list(teachers),
        fusion_weight=fusion_weight,
        temperature=temperature,
        divergence=divergence,
        chunk=min(chunk or chunk_rows(head), max(len(labels), 1)),
        count=count,
        matmul_dtype=matmul_dtype or accum_dtype(hidden),
        with_student_stats=with_student_stats,
    )
    return FusedLoss(*_FusedLossFunction.apply(hidden, head, bias, weights, settings))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _LossSettings:
    """What the loss is made of besides the tensors it has gradients for."""

    labels: Tensor
    teachers: list[TeacherDistribution]
    fusion_weight: float
    temperature: float
    divergence: Divergence
    chunk: int
    count: float
    matmul_dtype: torch.dtype
    with_student_stats: bool

    def chunks(self) -> list[slice | Tensor]:
        """The rows that are not ignored, in chunks."""
        counted = self.labels != IGNORED
        if bool(counted.all()):
            total = len(self.labels)
            return [slice(start, min(start + self.chunk, total)) for start in range(0, total, self.chunk)]
        return [part for part in torch.split(counted.nonzero()[:, 0], self.chunk) if len(part)]


class _FusedLossFunction(torch.autograd.Function):
    """Computes the gradients in the forward pass and hands them out in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, weights: Tensor, settings: _LossSettings
    ) -> tuple[Tensor, ...]:
        needs_grad = ctx.needs_input_grad
        computation = _FusedLossComputation(hidden, head, bias, weights, settings, needs_grad)
        for rows in settings.chunks():
            computation.add(rows)
        gradients = zip(computation.gradients, needs_grad, strict=False)
        ctx.save_for_backward(*(gradient if needed else None for gradient, needed in gradients))
        result = computation.result()
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if bool(grad_loss == 1):  # as a trainer calls it: scaling by 1 would copy the head's gradient, which is large
            return (*ctx.saved_tensors, None)
        return (*(None if gradient is None else grad_loss * gradient for gradient in ctx.saved_tensors), None)


class _FusedLossComputation:
    """One pass over the rows: the sums, and the gradients of those inputs that need one."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        settings: _LossSettings,
        needs_grad: Sequence[bool],
    ):
        dtype = accum_dtype(hidden)
        self.settings = settings
        self.hidden = hidden
        self.head = head.to(settings.matmul_dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.weights = weights.to(dtype)
        self.loss, self.sft, self.fusion = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(3))
        self.cross_entropy = torch.zeros_like(self.weights)
        self.student_stats = self.weights.new_zeros(len(hidden) if settings.with_student_stats else 0, 3)
        inputs = zip((hidden, head, bias, weights), needs_grad, strict=False)
        self.gradients = [None if x is None or not needed else torch.zeros_like(x) for x, needed in inputs]
        self.any_grad = any(needs_grad)
        self.tile = settings.chunk if hidden.is_cuda else min(settings.chunk, max(1, TILE_VALUES // len(head)))
        self.log_p = self.weights.new_empty(settings.chunk, len(head))
        self.grad_logits = self.weights.new_empty(settings.chunk if self.any_grad else 0, len(head))
        self.tile_buffer = self.weights.new_empty(self.tile, len(head))

    def result(self) -> tuple[Tensor, ...]:
        """The fields of :class:`FusedLoss`."""
        return self.loss / self.settings.count, self.sft, self.fusion, self.cross_entropy, self.student_stats

    def add(self, rows: slice | Tensor) -> None:
        """Add a chunk of rows."""
        settings = self.settings
        labels = settings.labels[rows, None]  # (c, 1)
        states = self.hidden[rows].to(self.head.dtype)  # (c, d)
        log_p = matmul(states, self.head.t(), out=self.log_p[: len(states)])  # (c, V)
        log_softmax_(log_p if self.bias is None else log_p.add_(self.bias))
        sft = -log_p.gather(1, labels).sum()
        if settings.with_student_stats:
            self.student_stats[rows] = self._student_stats(log_p, labels)
        grad_logits = self.grad_logits[: len(states)]
        self._start_grad_logits(log_p, grad_logits, self.weights[rows], labels)
        terms = (self._add_teacher(k, rows, log_p, grad_logits) for k in range(len(settings.teachers)))
        fusion = sum(terms, start=sft.new_zeros(()))
        self.sft += sft
        self.fusion += fusion
        self.loss += (1 - settings.fusion_weight) * sft + settings.fusion_weight * fusion
        if self.any_grad:
            self._add_gradients(rows, states, grad_logits)

    def _start_grad_logits(self, log_p: Tensor, grad_logits: Tensor, weights: Tensor, labels: Tensor) -> None:
        """All of dL/dz but the teachers' own parts; leaves ``log_p`` (c, V) at the temperature."""
        settings = self.settings
        sft_weight = 1 - settings.fusion_weight
        by_sft = weights.new_full(labels.shape, sft_weight)  # (c, 1)
        by_teachers: Tensor | int = 0
        if settings.divergence is forward_kl:
            by_teachers = weights.sum(1, keepdim=True) * settings.fusion_weight / settings.temperature  # (c, 1)
        if settings.temperature == 1 or not settings.teachers:
            self._scale_probs(log_p, grad_logits, by_teachers + by_sft)
        else:
            self._scale_probs(log_p, grad_logits, by_sft)
            log_softmax_(log_p, settings.temperature)  # the same as of the logits, which differ by a constant in a row
            self._scale_probs(log_p, grad_logits, by_teachers + weights.new_zeros(labels.shape), add=True)
        if self.any_grad:
            grad_logits.scatter_add_(1, labels, weights.new_full(labels.shape, -sft_weight))

    def _tiles(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``count`` rows, each with a buffer of its size."""
        for start in range(0, count, self.tile):
            rows = slice(start, min(start + self.tile, count))
            yield rows, self.tile_buffer[: rows.stop - start]

    def _scale_probs(self, log_p: Tensor, grad_logits: Tensor, factor: Tensor, add: bool = False) -> None:
        """``grad_logits (c, V) = factor (c, 1) exp(log_p)``, or added to it."""
        for rows, p in self._tiles(len(grad_logits)):
            torch.exp(log_p[rows], out=p)
            if add:
                grad_logits[rows].addcmul_(p, factor[rows])
            else:
                torch.mul(p, factor[rows], out=grad_logits[rows])

    def _student_stats(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Entropy, cross-entropy, and whether the label is the most likely token, (c, 3)."""
        out = log_p.new_empty(len(log_p), 3)
        for rows, p in self._tiles(len(log_p)):
            torch.exp(log_p[rows], out=p)
            out[rows, 0] = -_row_dot(p, log_p[rows])
            out[rows, 2] = (log_p[rows].argmax(1) == labels[rows, 0]).to(out.dtype)
        out[:, 1] = -log_p.gather(1, labels)[:, 0]
        return out

    def _add_teacher(self, k: int, rows: slice | Tensor, log_p: Tensor, grad_logits: Tensor) -> Tensor:
        """Sum of a teacher's weighted divergences; its own part of dL/dz is added to ``grad_logits``."""
        grad_weights = self.gradients[3]
        weight = self.weights[rows, k : k + 1]  # (c, 1)
        used = self._used_rows(weight, grad_weights is not None)
        weight = weight[used]  # (u, 1)
        if not len(weight):  # MinCE leaves a teacher without a row
            return weight.new_zeros(())
        batch_rows = _batch_rows(rows, used)
        cross_entropy, divergence = self._divergences(k, batch_rows, used, weight, log_p, grad_logits)
        self.cross_entropy[batch_rows, k] = cross_entropy
        if grad_weights is not None:
            scale = self.settings.fusion_weight / self.settings.count
            grad_weights[batch_rows, k] = (scale * divergence).to(grad_weights.dtype)
        return weight[:, 0] @ divergence

    @staticmethod
    def _used_rows(weight: Tensor, all_rows: bool) -> slice | Tensor:
        """Rows of a chunk in which a teacher has a weight, ``(c, 1)``; all of them where weights need a gradient."""
        if all_rows or bool((weight != 0).all()):
            return slice(None)
        return (weight[:, 0] != 0).nonzero()[:, 0]

    def _divergences(
        self,
        k: int,
        batch_rows: slice | Tensor,
        used: slice | Tensor,
        weight: Tensor,
        log_p: Tensor,
        grad_logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``CE(P^k, p)`` and the divergence at a chunk's used rows, both (u,)."""
        settings = self.settings
        log_q = settings.teachers[k].log_probs(batch_rows, settings.temperature)  # (u, V)
        entropy = self._known_entropy(k, batch_rows, log_q.dtype)
        scale = settings.fusion_weight / settings.temperature
        cross_entropy = weight.new_empty(len(weight))
        divergence = weight.new_empty(len(weight))
        for tile, q in self._tiles(len(weight)):
            rows = tile if isinstance(used, slice) else used[tile]
            if settings.divergence is forward_kl:
                tile_entropy = None if entropy is None else entropy[tile]
                values = self._forward_kl(log_q[tile], log_p[rows], q, tile_entropy)
            else:
                values = self._other_divergence(log_q[tile], log_p[rows], q)
            cross_entropy[tile], divergence[tile] = values
            if self.any_grad:
                _subtract(grad_logits, rows, q, weight[tile] * scale)
        return cross_entropy, divergence

    def _known_entropy(self, k: int, batch_rows: slice | Tensor, dtype: torch.dtype) -> Tensor | None:
        """The teacher's entropy at some rows, where it is that of ``log_probs`` at the loss's temperature."""
        teacher = self.settings.teachers[k]
        if teacher.is_own_entropy and self.settings.temperature == 1:
            return teacher.entropy[batch_rows].to(dtype)
        return None

    @staticmethod
    def _forward_kl(log_q: Tensor, log_p: Tensor, q: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        """``CE(Q, p)`` and ``KL(Q || p)`` of a tile's rows, (r,); leaves Q in ``q``, for the gradient."""
        cross_entropy = -_row_dot(torch.exp(log_q, out=q), log_p)
        if entropy is not None:
            return cross_entropy, cross_entropy - entropy
        negative_entropy = _row_dot(q, log_q)
        if bool(negative_entropy.isnan().any()):  # an unknown token is 0 x -inf
            negative_entropy = _row_dot(q, log_q.clamp(min=torch.finfo(log_q.dtype).min))
        return cross_entropy, cross_entropy + negative_entropy

    def _other_divergence(self, log_q: Tensor, log_p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """``CE(Q, p)`` and another divergence of a tile's rows, (r,); leaves minus its gradient by logits in ``q``."""
        cross_entropy = -_row_dot(torch.exp(log_q, out=q), log_p)
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            divergence = self.settings.divergence(log_q, leaf)
            (grad_log_p,) = torch.autograd.grad(divergence.sum(), leaf)
        torch.exp(log_p, out=q).mul_(grad_log_p.sum(1, keepdim=True)).sub_(grad_log_p)  # through the log-softmax
        return cross_entropy, divergence.detach()

    def _add_gradients(self, rows: slice | Tensor, states: Tensor, grad_logits: Tensor) -> None:
        """From dL/dz (c, V) to the inputs."""
        grad_hidden, grad_head, grad_bias, _ = self.gradients
        if self.settings.count != 1:
            grad_logits.div_(self.settings.count)
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(self.head.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = matmul(grad_logits, self.head).to(grad_hidden.dtype)
        if grad_head is not None:
            add_matmul(grad_head, grad_logits.t(), states)


def _batch_rows(rows: slice | Tensor, used: slice | Tensor) -> slice | Tensor:
    """A chunk's used rows, as rows of the batch."""
    if isinstance(used, slice):
        return rows
    return used + rows.start if isinstance(rows, slice) else rows[used]


def _subtract(grad_logits: Tensor, rows: slice | Tensor, q: Tensor, weight: Tensor) -> None:
    """``grad_logits[rows] -= weight q``; ``q`` may be overwritten."""
    if isinstance(rows, slice):
        grad_logits[rows].addcmul_(q, weight, value=-1)
    else:
        grad_logits.index_add_(0, rows, q.mul_(weight), alpha=-1)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (r,)."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product
