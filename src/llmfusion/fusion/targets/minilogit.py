"""Element-wise minimum of the teachers' logits relative to the gold token (KDCL).

KDCL-MinLogit, Guo et al. 2020: the one target that is no mixture of the teachers' distributions. With the logits z_k of
teacher k and the label y of a row, over the teachers that are usable there:

    z^c_k = z_k - z_k[y]        z[v] = min_k z^c_k[v]        P = softmax(z / T)

z[y] = 0 and z <= z^c_k, so CE(y, P) = logsumexp(z) is at most the best teacher's. Log-probabilities serve as logits:
they differ by a constant, which the first step takes away. A token that one usable teacher does not know (-inf) has
probability 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfusion.fusion.target import Combination, FusionTarget, TeacherStats
from llmfusion.io.lazy import torch
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from llmfusion.fusion.fused_loss import TeacherDistribution
    from llmfusion.fusion.student import StudentBatch

CHUNK_ROWS = 256  # rows whose (c, V) logits exist at once


class Options(FusionOptions):
    target: Literal["minilogit"] = Field(
        description="element-wise minimum of the teachers' logits relative to the gold token (KDCL)"
    )


class Target(FusionTarget):
    title = "Unified fusion, Minilogit"
    topk_refusal = "compares the logits of all tokens"

    def combine(
        self, distributions: Sequence[TeacherDistribution], student: StudentBatch, stats: TeacherStats
    ) -> Combination:
        """The ensemble as the one distribution, with weight 1 where a teacher is usable."""
        ensemble = MinilogitDistribution(distributions, student.labels)
        return Combination([ensemble], ensemble.mask[:, None], ensemble.share)


def relative_minimum(log_qs: Iterable[Tensor], labels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """``z (c, V)`` of K teachers' log-probabilities at T = 1, (c, V) each, and the teacher of each value, (c, V).

    ``labels (c,)``; ``masks (c, K)`` is 0 where a teacher cannot be used; one to which the label is impossible cannot
    either. Equal values go to the teacher named first. A row without a usable teacher is 0 everywhere, and its teacher
    -1. The log-probabilities are overwritten; of an iterator only one teacher's exist at a time.
    """
    lowest = teacher = torch.empty(0)
    for k, relative in enumerate(log_qs):
        gold = relative.gather(1, labels[:, None])  # (c, 1)
        usable = gold.isfinite() & (masks[:, k : k + 1] > 0)
        relative = torch.where(usable, relative.sub_(gold), torch.inf)
        if k == 0:
            lowest = relative
            teacher = torch.where(relative < torch.inf, 0, -1).to(torch.int16)
            continue
        teacher.masked_fill_(relative < lowest, k)
        torch.minimum(lowest, relative, out=lowest)
    return lowest.masked_fill_(teacher[:, :1] < 0, 0), teacher


class MinilogitDistribution:
    """The ensemble P as one teacher, frozen as the teachers are.

    Implements :class:`~llmfusion.fusion.fused_loss.TeacherDistribution`.
    ``mask (N,)`` is 1 where at least one teacher is usable; elsewhere ``entropy`` and ``cross_entropy`` are 0 and the
    row is SFT's alone. ``share (N, K)`` is the share of the tokens, the label aside, whose value each teacher gave.
    """

    is_own_entropy = False  # where no teacher is usable it is 0

    def __init__(self, teachers: Sequence[TeacherDistribution], labels: Tensor, chunk: int = CHUNK_ROWS):
        self.teachers = teachers
        self.labels = labels
        self.masks = torch.stack([teacher.mask for teacher in teachers], 1)
        parts = [self._statistics(slice(start, start + chunk)) for start in range(0, len(labels), chunk)]
        self.mask, self.entropy, self.cross_entropy, self.share = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``log softmax(z / T)``, (c, V)."""
        return torch.nn.functional.log_softmax(self._minimum(rows)[0] / temperature, dim=-1)

    def _minimum(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_qs = (teacher.log_probs(rows, 1.0) for teacher in self.teachers)
            return relative_minimum(log_qs, self.labels[rows], self.masks[rows])

    def _statistics(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mask, entropy and cross-entropy (c,), and the teachers' shares (c, K)."""
        z, teacher = self._minimum(rows)
        labels = self.labels[rows, None]
        usable = (teacher[:, 0] >= 0).to(z.dtype)
        log_q = torch.nn.functional.log_softmax(z, dim=-1)
        entropy = -(log_q.exp() * log_q.masked_fill(log_q.isinf(), 0)).sum(-1)
        others = teacher.scatter(1, labels, -1)  # the label's value is 0 under all
        counts = torch.stack([(others == k).sum(1) for k in range(len(self.teachers))], 1)
        share = counts.to(z.dtype) / max(z.shape[1] - 1, 1)
        return usable, entropy * usable, -log_q.gather(1, labels)[:, 0] * usable, share
