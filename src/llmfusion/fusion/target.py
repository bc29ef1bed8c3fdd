"""The base of fusion targets: how much each teacher counts at each label token, and what a target can take.

A target is one file in :mod:`llmfusion.fusion.targets`: its ``Options`` and its ``Target``, an ``nn.Module``
(docs/extending.md). A study is checked from the options and the class attributes alone, without torch. So a target has
no torch base class when its file is imported; :func:`~llmfusion.fusion.objective.build_target` adds ``nn.Module`` when
a training begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmfusion.fusion.fused_loss import TeacherDistribution
    from llmfusion.fusion.student import StudentBatch
else:
    Module = object


@dataclass(frozen=True)
class TeacherStats:
    """Statistics of K teachers at N label tokens, in nats and at temperature 1.

    ``entropy (N, K)`` of each teacher's distribution, ``cross_entropy (N, K)`` = -log P^k(y), ``mask (N, K)`` 1 where
    the teacher is usable, ``sequence (N,)`` the index of the sample that a token belongs to, from 0 without gaps.
    """

    entropy: Tensor
    cross_entropy: Tensor
    mask: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class Combination:
    """What the student is trained towards: ``sum_j weights_tj D(P^j || p)`` over J distributions, and the penalty.

    ``weights (N, J)``; ``shares (N, K)`` is how much each of the K teachers counts, which is recorded in
    ``metrics.jsonl``; ``penalty`` is a scalar, a mean over the N tokens, or None.
    """

    distributions: Sequence[TeacherDistribution]
    weights: Tensor
    shares: Tensor
    penalty: Tensor | None = None


class FusionTarget(Module):
    """Base of every target. Needed are ``title``, and ``forward`` or ``combine``."""

    title: ClassVar[str] = ""  # what model cards print, e.g. "Unified fusion, UDF"
    min_teachers: ClassVar[int] = 2
    max_teachers: ClassVar[int | None] = None  # None: any number
    # Why the k most likely tokens of a teacher (capture.kind topk) do not do: completes "NAME ...". None: they do.
    topk_refusal: ClassVar[str | None] = None
    # Whether teachers of another vocabulary, which are projected into the student's (DSKD), can be used.
    accepts_other_vocabularies: ClassVar[bool] = True
    accepts_temperature: ClassVar[bool] = True  # temperatures other than 1
    accepts_pivot: ClassVar[bool] = False  # the model that the training starts from, frozen, as one of the teachers

    options: FusionOptions
    learning_rate: float | None = None  # peak rate of the target's own parameters; None: the student's

    def __init__(self, options: FusionOptions, teachers: int, hidden_size: int):
        """``teachers``: their number K; ``hidden_size``: d of the student's final states, which ``combine`` sees.

        A target with parameters creates them here, after this call.
        """
        super().__init__()
        self.options = options

    def forward(self, stats: TeacherStats) -> tuple[Tensor, Tensor | None]:
        """Weights (N, K), never negative and 0 where ``stats.mask`` is 0, and a penalty or None.

        The penalty is a differentiable scalar, a mean over the N tokens of a micro-batch. It is added inside the fusion
        term, which lambda multiplies; its own weight is the target's affair. One that is not linear in the tokens (a
        load balance, say) is then that of micro-batches, and depends on their size. Gradients reach the target's
        parameters through both.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither forward nor combine")

    def combine(
        self, distributions: Sequence[TeacherDistribution], student: StudentBatch, stats: TeacherStats
    ) -> Combination:
        """The K teachers' distributions, weighted by :meth:`forward`. A target that is no mixture overrides this."""
        weights, penalty = self(stats)
        if weights.shape != stats.mask.shape:
            shapes = f"weights of shape {tuple(weights.shape)}, expected {tuple(stats.mask.shape)}"
            raise ValueError(f"fusion target {self.options.target}: {shapes} (label tokens, teachers)")
        return Combination(distributions, weights, weights.detach(), penalty)
