"""What a training minimises: SFT alone, or with a fusion target over teachers. The trainer does not know which.

``L = (1 - lambda) SFT + lambda [F + penalty + sum_het (CE_t2s + s2t) / K_het]``: F is the target over all teachers'
distributions at the student's rows, the penalty is the target's own, and every teacher of another vocabulary adds what
trains its projectors (docs/methods.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmfusion.data.chat import TokenizedSample
from llmfusion.fusion.divergences import DIVERGENCES
from llmfusion.fusion.dskd import auxiliary_loss
from llmfusion.fusion.fused_loss import FusedLoss, fused_loss
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.target import Combination, FusionTarget, TeacherStats
from llmfusion.fusion.teacher import Teacher, TeacherOutput
from llmfusion.study.fusion_targets import load_target
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.training import Training


@dataclass(frozen=True)
class StepTokenCounts:
    """What the loss of an optimizer step is divided by: label tokens of the student, and label rows of each teacher."""

    labels: int
    teachers: list[int]


def build_target(options: FusionOptions, teachers: int, hidden_size: int) -> FusionTarget:
    """The target that ``options`` name, over this many teachers, as an ``nn.Module``."""
    cls = load_target(options.target).Target
    module = type(cls.__name__, (cls, nn.Module), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    target: FusionTarget = module(options, teachers, hidden_size)
    return target


class Objective(nn.Module):
    """The loss of a training, and what it trains beside the student: projectors, and the target's parameters.

    They are created under the global seed: first the projectors in the order of the teachers, then the target.
    """

    def __init__(self, fusion: FusionOptions | None, teachers: Sequence[Teacher], student_width: int):
        super().__init__()
        if bool(teachers) != (fusion is not None):
            raise ValueError("teachers and options of a fusion target go together")
        self.teachers: list[Teacher] = list(teachers)
        self.fusion = fusion
        self.projectors_of = [teacher.projectors(student_width) for teacher in self.teachers]  # None: needs none
        self.projectors = nn.ModuleList([module for module in self.projectors_of if module is not None])
        self.target = None if fusion is None else build_target(fusion, len(self.teachers), student_width)

    def parameter_groups(self, run: Training) -> list[dict[str, Any]]:
        """Groups for the optimizer, none of them empty: ``params``, and their peak learning rate ``peak_lr``."""
        if self.fusion is None or self.target is None:
            return []
        target_lr = run.lr if self.target.learning_rate is None else self.target.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": list(self.projectors.parameters()), "peak_lr": self.fusion.projector_lr},
            {"params": list(self.target.parameters()), "peak_lr": target_lr},
        ]
        return [group for group in groups if group["params"]]

    def count_tokens(self, batch: Sequence[TokenizedSample]) -> StepTokenCounts:
        """The counts of a whole optimizer step; its micro-batches are divided by them, so that the split is free."""
        labels = sum(len(sample.encoded.label_ids) for sample in batch)
        return StepTokenCounts(labels, [teacher.label_count(batch) for teacher in self.teachers])

    def forward(
        self, student: StudentBatch, batch: Sequence[TokenizedSample], counts: StepTokenCounts
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch, divided by ``counts``, and what is to be recorded; both add up over micro-batches.

        Recorded per token (nats): ``loss``, ``sft``; with teachers ``fusion``, and by teacher ``weight``, ``usable``,
        ``cross_entropy`` (the teacher's, on its usable rows); by projected teacher ``t2s_ce``, ``s2t_kl`` and
        ``aligned``; ``penalty`` of a target that has one.
        """
        if self.fusion is None or self.target is None:
            result = _fused_loss(student, counts)
            return result.loss, {"loss": float(result.loss.detach()), "sft": float(result.sft) / counts.labels}
        outputs = self._outputs(student, batch)
        distributions = [output.distribution for output in outputs]
        combination = self.target.combine(distributions, student, _teacher_stats(outputs, student))
        result = _fused_loss(student, counts, self.fusion, combination)
        loss = result.loss + self.fusion.weight * _auxiliary_loss(outputs, counts)
        sums = {"sft": result.sft / counts.labels, "fusion": result.fusion / counts.labels}
        if combination.penalty is not None:  # a mean over this micro-batch, which has a share of the step's tokens
            sums["penalty"] = combination.penalty * (len(student.labels) / counts.labels)
            loss = loss + self.fusion.weight * sums["penalty"]
        record = {name: float(value.detach()) for name, value in {"loss": loss, **sums}.items()}
        return loss, {**record, **self._by_teacher(outputs, combination.shares, counts)}

    def projector_loss(
        self, student: StudentBatch, batch: Sequence[TokenizedSample], counts: StepTokenCounts
    ) -> Tensor:
        """Only what trains the projectors, for steps before the student's first; its states must be detached."""
        return torch.as_tensor(_auxiliary_loss(self._outputs(student, batch), counts))

    def _outputs(self, student: StudentBatch, batch: Sequence[TokenizedSample]) -> list[TeacherOutput]:
        temperature = self.fusion.temperature if self.fusion else 1.0
        return [
            teacher.output(batch, student, projectors, temperature)
            for teacher, projectors in zip(self.teachers, self.projectors_of, strict=True)
        ]

    def _by_teacher(
        self, outputs: Sequence[TeacherOutput], shares: Tensor, counts: StepTokenCounts
    ) -> dict[str, dict[str, float]]:
        """Records by name and teacher."""
        names = [teacher.name for teacher in self.teachers]
        distributions = [output.distribution for output in outputs]
        sums = {
            "weight": shares.sum(0).tolist(),
            "usable": [float(d.mask.sum()) for d in distributions],
            "cross_entropy": [float((d.cross_entropy * d.mask).sum()) for d in distributions],
        }
        out = {
            key: {name: value / counts.labels for name, value in zip(names, values, strict=True)}
            for key, values in sums.items()
        }
        return out | self._by_projected_teacher(outputs, counts)

    def _by_projected_teacher(
        self, outputs: Sequence[TeacherOutput], counts: StepTokenCounts
    ) -> dict[str, dict[str, float]]:
        """Records of the projected teachers, by name and teacher; empty without any."""
        out: dict[str, dict[str, float]] = {}
        for teacher, output, count in zip(self.teachers, outputs, counts.teachers, strict=True):
            if (space := output.dual_space) is not None:
                out.setdefault("t2s_ce", {})[teacher.name] = float(space.t2s_ce.detach()) / counts.labels
                out.setdefault("s2t_kl", {})[teacher.name] = float(space.s2t_kl.detach()) / count
                out.setdefault("aligned", {})[teacher.name] = float(space.aligned.sum()) / counts.labels
        return out


def _fused_loss(
    student: StudentBatch,
    counts: StepTokenCounts,
    fusion: FusionOptions | None = None,
    combination: Combination | None = None,
) -> FusedLoss:
    """SFT, or SFT and fusion, of a micro-batch, divided by the step's label tokens."""
    return fused_loss(
        student.hidden,
        student.head,
        student.bias,
        student.labels,
        combination.distributions if combination else (),
        combination.weights if combination else None,
        fusion_weight=fusion.weight if fusion else 0.0,
        temperature=fusion.temperature if fusion else 1.0,
        divergence=DIVERGENCES[fusion.divergence if fusion else "forward_kl"],
        count=counts.labels,
        matmul_dtype=student.matmul_dtype,
    )


def _teacher_stats(outputs: Sequence[TeacherOutput], student: StudentBatch) -> TeacherStats:
    """Statistics of the K teachers at the batch's N label rows."""
    sizes = torch.tensor(student.sizes)
    sequence = torch.repeat_interleave(torch.arange(len(student.sizes)), sizes).to(student.labels.device)  # (N,)
    distributions = [output.distribution for output in outputs]
    return TeacherStats(
        entropy=torch.stack([d.entropy for d in distributions], 1),  # (N, K)
        cross_entropy=torch.stack([d.cross_entropy for d in distributions], 1),
        mask=torch.stack([d.mask for d in distributions], 1),
        sequence=sequence,
    )


def _auxiliary_loss(outputs: Sequence[TeacherOutput], counts: StepTokenCounts) -> Tensor | float:
    """The terms of the projected teachers; 0 without any."""
    projected = [
        (output.dual_space, count)
        for output, count in zip(outputs, counts.teachers, strict=True)
        if output.dual_space is not None
    ]
    if not projected:
        return 0.0
    return auxiliary_loss([space for space, _ in projected], counts.labels, [count for _, count in projected])


def add_records(sums: dict[str, Any], more: dict[str, Any]) -> None:
    """Add one micro-batch's records to ``sums``, in place."""
    for name, value in more.items():
        if isinstance(value, dict):
            add_records(sums.setdefault(name, {}), value)
        else:
            sums[name] = sums.get(name, 0.0) + value
