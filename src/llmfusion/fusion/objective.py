"""What a training minimises: SFT alone, or with a fusion target over teachers. The trainer does not know which.

``L = (1 - lambda) SFT + lambda [F + sum_het (CE_t2s + s2t) / K_het]``: F is the target over all teachers' distributions at the
student's rows, and every teacher of another vocabulary adds what trains its projectors (docs/methods.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmfusion.fusion.divergences import DIVERGENCES
from llmfusion.fusion.dskd import StudentBatch, auxiliary
from llmfusion.fusion.fused_loss import TeacherDistribution, fused_loss
from llmfusion.fusion.minilogit import MinilogitDistribution
from llmfusion.fusion.targets import TARGETS, TeacherStats
from llmfusion.fusion.teacher import Teacher, TeacherOutput, TokenizedSample
from llmfusion.study.schema.options import FusionOptions

NAMES = (*TARGETS, "minilogit")


@dataclass(frozen=True)
class StepTokenCounts:
    """What the loss of a whole optimizer step is divided by: label tokens of the student, and label rows of each teacher."""

    labels: int
    teachers: list[int]


class Objective(nn.Module):
    """The loss of a training, and the projectors it trains beside the student (created under the global seed, in teacher order)."""

    teachers: list[Teacher]

    def __init__(self, fusion: FusionOptions | None, teachers: Sequence[Teacher], width: int):
        super().__init__()
        self.teachers: list[Teacher] = list(teachers)
        self.fusion = fusion
        self.target = fusion.target if fusion else "kd"
        self.weight = fusion.weight if fusion else 0.0
        self.temperature = fusion.temperature if fusion else 1.0
        self.divergence = DIVERGENCES[fusion.divergence if fusion else "forward_kl"]
        self.given = [teacher.projectors(width) for teacher in self.teachers]
        self.projectors = nn.ModuleList([module for module in self.given if module is not None])

    def totals(self, drawn: Sequence[TokenizedSample]) -> StepTokenCounts:
        """The counts of a whole optimizer step; its micro-batches are divided by them, so that their split does not matter."""
        return StepTokenCounts(
            sum(len(d.encoded.label_ids) for d in drawn), [teacher.rows_of(drawn) for teacher in self.teachers]
        )

    def forward(
        self, student: StudentBatch, drawn: Sequence[TokenizedSample], totals: StepTokenCounts
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch, divided by ``totals``, and what is to be recorded; both add up over micro-batches.

        Recorded per token (nats): ``loss``, ``sft``; with teachers ``fusion``, and by teacher ``weight``, ``usable``,
        ``cross_entropy`` (the teacher's, on its usable rows); by projected teacher ``t2s_ce``, ``s2t_kl`` and ``aligned``.
        """
        fused = partial(
            fused_loss,
            student.hidden,
            student.head,
            student.bias,
            student.labels,
            count=totals.labels,
            products=student.products,
        )
        if not self.teachers:
            result = fused()
            return result.loss, {"loss": float(result.loss.detach()), "sft": float(result.sft) / totals.labels}
        views = self._views(student, drawn)
        rows, weights, shares = self._combined([view.rows for view in views], student)
        result = fused(rows, weights, self.weight, self.temperature, self.divergence)
        loss = result.loss + self.weight * self._auxiliary(views, totals)
        sums = {"loss": loss, "sft": result.sft / totals.labels, "fusion": result.fusion / totals.labels}
        return loss, {
            **{name: float(value.detach()) for name, value in sums.items()},
            **self._by_teacher(views, shares, totals),
        }

    def projection(self, student: StudentBatch, drawn: Sequence[TokenizedSample], totals: StepTokenCounts) -> Tensor:
        """Only what trains the projectors, for steps before the student's first; the student's states must be detached."""
        return torch.as_tensor(self._auxiliary(self._views(student, drawn), totals))

    def _views(self, student: StudentBatch, drawn: Sequence[TokenizedSample]) -> list[TeacherOutput]:
        return [
            teacher.view(drawn, student, given, self.temperature)
            for teacher, given in zip(self.teachers, self.given, strict=True)
        ]

    def _combined(
        self, rows: list[TeacherDistribution], student: StudentBatch
    ) -> tuple[list[TeacherDistribution], Tensor, Tensor]:
        """What the student is drawn to, its weights (N, .), and how much each teacher has to say, (N, K)."""
        if self.target == "minilogit":  # the one target that is no mixture of the teachers' distributions
            ensemble = MinilogitDistribution(rows, student.labels)
            return [ensemble], ensemble.mask[:, None], ensemble.share
        sequence = torch.repeat_interleave(torch.arange(len(student.sizes)), torch.tensor(student.sizes)).to(
            student.labels.device
        )
        entropy, cross_entropy, mask = (
            torch.stack([getattr(r, name) for r in rows], 1) for name in ("entropy", "cross_entropy", "mask")
        )
        weights = TARGETS[self.target](TeacherStats(entropy, cross_entropy, mask, sequence), self.fusion)
        return rows, weights, weights

    def _auxiliary(self, views: list[TeacherOutput], totals: StepTokenCounts) -> Tensor | float:
        projected = [
            (view.space, count) for view, count in zip(views, totals.teachers, strict=True) if view.space is not None
        ]
        return (
            auxiliary([space for space, _ in projected], totals.labels, [count for _, count in projected])
            if projected
            else 0.0
        )

    def _by_teacher(
        self, views: list[TeacherOutput], shares: Tensor, totals: StepTokenCounts
    ) -> dict[str, dict[str, float]]:
        names = [teacher.name for teacher in self.teachers]
        mean = {"weight": shares.sum(0).tolist(), "usable": [float(v.rows.mask.sum()) for v in views]}
        mean["cross_entropy"] = [float((v.rows.cross_entropy * v.rows.mask).sum()) for v in views]
        out = {
            key: {n: value / totals.labels for n, value in zip(names, values, strict=True)}
            for key, values in mean.items()
        }
        spaces = [(n, v.space, m) for n, v, m in zip(names, views, totals.teachers, strict=True) if v.space is not None]
        if spaces:
            out["t2s_ce"] = {n: float(space.t2s_ce.detach()) / totals.labels for n, space, _ in spaces}
            out["s2t_kl"] = {n: float(space.s2t_kl.detach()) / rows for n, space, rows in spaces}
            out["aligned"] = {n: float(space.aligned.sum()) / totals.labels for n, space, _ in spaces}
        return out


def add_records(sums: dict[str, Any], more: dict[str, Any]) -> None:
    """Add one micro-batch's records to ``sums``, in place."""
    for name, value in more.items():
        if isinstance(value, dict):
            add_records(sums.setdefault(name, {}), value)
        else:
            sums[name] = sums.get(name, 0.0) + value
