"""Dual-space distillation (DSKD, Zhang et al. 2024) from a teacher with another vocabulary.

In the samples of a batch a student of width d has N label rows and a teacher of width D has M. x is a row's input
token, y its label, h its final hidden state. "Cross-Model Attention Mechanism", within each sample:

    Q   = query([emb_s(x); emb_s(y)])               (N, 2D)
    K   = [emb_t(x); emb_t(y)] / std                (M, 2D)
    A   = Q K^T / sqrt(2D)                          (N, M)
    V_t = t2s(h_t / std + emb_t(y) / std)           (M, d)
    V_s = s2t(h_s)                                  (N, D)

    P   = softmax(W_s softmax_M(A) V_t)             the teacher at the student's rows
    p_t = softmax(W_t softmax_N(A)^T V_s)           the student at the teacher's rows

"Dual-Space Knowledge Distillation Framework", all sums over label rows:

    t2s_ce = sum_n CE(y_n, P_n)                 trains t2s and query
    kd     = sum_n m_n KL(stop(P_n) || p_n)     trains the student, by a fusion target; m_n = [argmax P_n = y_n]
    s2t_kl = sum_m KL(teacher_m || p_t,m)       trains s2t, query and, through h_s, the student

The student's head W_s and embeddings, and everything of the teacher, are constants. With exact alignment (DSKDv2's
"Exact Token Alignment") the attention is one-hot instead: row n takes the teacher row whose label covers the same text
(:mod:`llmfusion.teachers.alignment`), rows without one take no part, and V_t = t2s(h_t / std), without the label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmfusion.errors import UserError
from llmfusion.fusion.fused_loss import IGNORED, FusedLoss, fused_loss
from llmfusion.fusion.head import head_log_probs, upcast
from llmfusion.fusion.student import StudentBatch


class Projectors(nn.Module):
    """Between a student of width ``student`` (d) and one teacher of width ``teacher`` (D); not needed after training.

    ``t2s`` D -> d, ``s2t`` d -> D and, for attention, ``query`` 2d -> 2D: linear with bias, initialised as torch does.
    """

    def __init__(self, student: int, teacher: int, attention: bool = True):
        super().__init__()
        self.t2s = nn.Linear(teacher, student)
        self.s2t = nn.Linear(student, teacher)
        self.query = nn.Linear(2 * student, 2 * teacher) if attention else None


@dataclass(frozen=True)
class TeacherSpace:
    """What is the same for all rows of a teacher: its head, embeddings, and the standard deviations from its cache.

    ``head (V, D)`` and ``bias (V,)`` over the tokens that the teacher knows, ``embedding (V', D)``. ``std_index`` is of
    [emb(x); emb(y)], ``std_target`` of emb(y), ``std_hidden`` of h, over all label rows of the corpus; DSKD takes them
    over the padded batch, so that its loss depends on how a batch is cut. Raises :class:`UserError` for unusable
    constants and widths.
    """

    head: Tensor
    bias: Tensor | None
    embedding: Tensor
    std_index: float
    std_target: float
    std_hidden: float

    def __post_init__(self) -> None:
        stds = {"std_index": self.std_index, "std_target": self.std_target, "std_hidden": self.std_hidden}
        wrong = {name: value for name, value in stds.items() if not 0 < value < float("inf")}
        if wrong:
            raise UserError(
                f"a teacher's standard deviations must be positive numbers, but its cache has {wrong}; capture it again"
            )
        embedding_width = self.embedding.shape[1]
        head_width = self.head.shape[1]
        if embedding_width != head_width:
            raise UserError(
                f"a teacher with embeddings of width {embedding_width} and a head of width {head_width} "
                "cannot be projected (DSKD)"
            )


@dataclass(frozen=True)
class TeacherBatch:
    """A teacher's label rows in the samples of a batch, from its cache, in the order of the samples.

    ``hidden (M, D)``, ``inputs (M,)`` and ``labels (M,)`` token ids; ``sizes``: rows of each sample, at least 1.
    """

    space: TeacherSpace
    hidden: Tensor
    inputs: Tensor
    labels: Tensor
    sizes: Sequence[int]


@dataclass(frozen=True)
class OwnScores:
    """``score: own``: the teacher's cached statistics at the student's rows, (N,) each.

    See :func:`llmfusion.teachers.alignment.redistribute_by_bytes`. A projected teacher's entropy and cross-entropy fall
    towards 0 as its projector learns to copy the label out of V_t; these do not. ``mask`` is 0 where the teacher has no
    row for the text; it cannot be scored there, and is not used.
    """

    entropy: Tensor
    cross_entropy: Tensor
    mask: Tensor


class ProjectedDistribution:
    """A projected teacher at the student's rows; no gradient passes.

    Implements :class:`~llmfusion.fusion.fused_loss.TeacherDistribution`.
    """

    is_own_entropy = False  # it may be the teacher's before it was projected

    def __init__(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, entropy: Tensor, cross_entropy: Tensor, mask: Tensor
    ):
        self.hidden = hidden
        self.head = head
        self.bias = bias
        self.entropy = entropy
        self.cross_entropy = cross_entropy
        self.mask = mask

    def log_probs(self, rows: slice | Tensor, temperature: float) -> Tensor:
        """``(c, v)``: the projected states through the student's own head as it is now."""
        return head_log_probs(self.hidden[rows], self.head, self.bias, temperature)


@dataclass(frozen=True)
class DualSpace:
    """One teacher's part in the loss: ``distribution`` for the fusion target, and two sums over rows with gradients.

    ``t2s_ce`` belongs to the student's label tokens and ``s2t_kl`` to the teacher's: each is divided by its own global
    count. With exact alignment both are sums over aligned rows, ``aligned (N,)``, and the counts stay those of all
    rows.
    """

    distribution: ProjectedDistribution
    t2s_ce: Tensor
    s2t_kl: Tensor
    aligned: Tensor


def dual_space(
    projectors: Projectors,
    student: StudentBatch,
    teacher: TeacherBatch,
    temperature: float = 1.0,
    matches: Tensor | None = None,
    own_scores: OwnScores | None = None,
    label_in_value: bool | None = None,
) -> DualSpace:
    """Both spaces of one teacher, in float32 or better; call it outside autocast.

    ``matches (N,)``: the batch's teacher row of each student row, -1 for none, instead of attention (exact alignment).
    ``own_scores``: score the teacher by these, not by its projection. ``label_in_value``: whether V_t contains
    emb_t(y), by default with attention only. The temperature softens both sides of the KLs; the cross-entropy and all
    scores are at T = 1. Heads are multiplied in ``student.matmul_dtype``.
    """
    values = _values(projectors, teacher, matches is None if label_in_value is None else label_in_value)  # (M, d)
    states = projectors.s2t(upcast(student.hidden))  # (N, D)
    if matches is None:
        projected, reverse = _attend(projectors, student, teacher, values, states)  # (N, d), (M, D)
        aligned = projected.new_ones(len(projected))
        teacher_aligned = reverse.new_ones(len(reverse))
    else:
        projected, reverse, aligned, teacher_aligned = _select(matches, values, states)
    t2s = _to_student(projected, student, aligned)
    s2t = _to_teacher(reverse, teacher, teacher_aligned, temperature, student.matmul_dtype)
    distribution = _projected_distribution(projected, student, t2s.student_stats, own_scores)
    return DualSpace(distribution, t2s.loss, s2t.loss, aligned)


def auxiliary_loss(spaces: Sequence[DualSpace], student_count: int, teacher_counts: Sequence[int]) -> Tensor:
    """``1/K sum_k (t2s_ce_k / N + s2t_kl_k / M_k)`` of K >= 1 projected teachers.

    N and M_k count the label rows of the whole batch. Its weight in the loss is lambda:
    ``L = (1 - lambda) SFT + lambda (F + this)``, which for K = 1 is DSKD.
    """
    parts = [
        space.t2s_ce / student_count + space.s2t_kl / teacher_count
        for space, teacher_count in zip(spaces, teacher_counts, strict=True)
    ]
    return torch.stack(parts).mean()


def input_ids(labels: Tensor, starts: Sequence[int], prompts: Sequence[int]) -> Tensor:
    """The input token of each label row of a sample, (n,).

    It is the label before it, or, at a response's first row (``starts``), the prompt's last token (``prompts``).
    """
    out = labels.roll(1)
    out[torch.tensor(starts, device=labels.device)] = torch.tensor(prompts, dtype=labels.dtype, device=labels.device)
    return out


def _aligned_labels(aligned: Tensor, labels: Tensor) -> Tensor:
    return torch.where(aligned > 0, labels, IGNORED)


def _to_student(states: Tensor, student: StudentBatch, aligned: Tensor) -> FusedLoss:
    """``sum CE(y, P)`` over aligned rows of the projected ``states (N, d)``, and P's statistics."""
    head, bias = _detached_head(student)
    labels = _aligned_labels(aligned, student.labels)
    return fused_loss(states, head, bias, labels, matmul_dtype=student.matmul_dtype, with_student_stats=True)


def _to_teacher(
    states: Tensor, teacher: TeacherBatch, aligned: Tensor, temperature: float, matmul_dtype: torch.dtype | None
) -> FusedLoss:
    """``sum KL(teacher_T || p_T)`` over aligned rows of ``states (M, D)``, in the teacher's vocabulary."""
    head = teacher.space.head
    bias = teacher.space.bias
    unused = aligned.new_zeros(len(aligned))  # a weight of 1 needs no statistics
    target = ProjectedDistribution(teacher.hidden.to(head.dtype), head, bias, unused, unused, aligned)
    return fused_loss(
        states,
        head,
        bias,
        _aligned_labels(aligned, teacher.labels),
        [target],
        torch.ones_like(aligned)[:, None],  # (M, 1)
        fusion_weight=1.0,
        temperature=temperature,
        matmul_dtype=matmul_dtype,
    )


def _projected_distribution(
    projected: Tensor, student: StudentBatch, stats: Tensor, own_scores: OwnScores | None
) -> ProjectedDistribution:
    """P, with the statistics ``stats (N, 3)`` of the projection or the teacher's own."""
    head, bias = _detached_head(student)
    entropy, cross_entropy, mask = stats.unbind(1)  # 0 where a row is not aligned
    if own_scores is not None:
        entropy = own_scores.entropy.to(mask)
        cross_entropy = own_scores.cross_entropy.to(mask)
        mask = mask * own_scores.mask.to(mask)
    states = projected.detach().to(student.matmul_dtype or projected.dtype)
    return ProjectedDistribution(states, head.to(states.dtype), bias, entropy, cross_entropy, mask)


def _detached_head(student: StudentBatch) -> tuple[Tensor, Tensor | None]:
    return student.head.detach(), None if student.bias is None else student.bias.detach()


def _values(projectors: Projectors, teacher: TeacherBatch, with_label: bool) -> Tensor:
    """V_t, (M, d)."""
    space = teacher.space
    states = upcast(teacher.hidden) / space.std_hidden
    if with_label:
        states = states + upcast(space.embedding[teacher.labels]) / space.std_target
    values: Tensor = projectors.t2s(states)
    return values


def _attend(
    projectors: Projectors, student: StudentBatch, teacher: TeacherBatch, values: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """``softmax_M(A) V_t`` (N, d) and ``softmax_N(A)^T V_s`` (M, D).

    Samples are padded to (B, n, m); the padding is outside of every softmax.
    """
    queries, keys = _queries_and_keys(projectors, student, teacher)
    student_places = _padded_places(student.sizes, keys.device)  # (N,)
    teacher_places = _padded_places(teacher.sizes, keys.device)  # (M,)
    q, v_s, student_present = (
        _pad(rows, student.sizes, student_places) for rows in (queries, states, states.new_ones(len(states), 1))
    )  # (B, n, .)
    k, v_t, teacher_present = (
        _pad(rows, teacher.sizes, teacher_places) for rows in (keys, values, values.new_ones(len(values), 1))
    )  # (B, m, .)
    scores = q @ k.transpose(1, 2) / keys.shape[1] ** 0.5  # (B, n, m)
    to_student = scores.masked_fill(teacher_present.transpose(1, 2) == 0, -torch.inf).softmax(2) @ v_t  # (B, n, d)
    to_teacher = scores.masked_fill(student_present == 0, -torch.inf).softmax(1).transpose(1, 2) @ v_s  # (B, m, D)
    return (
        to_student.flatten(0, 1).index_select(0, student_places),
        to_teacher.flatten(0, 1).index_select(0, teacher_places),
    )


def _queries_and_keys(projectors: Projectors, student: StudentBatch, teacher: TeacherBatch) -> tuple[Tensor, Tensor]:
    """Q (N, 2D) and K (M, 2D)."""
    if projectors.query is None:
        raise ValueError("these projectors have no query: they are for exact alignment")
    ours = student.embedding.detach()
    theirs = teacher.space.embedding
    queries = projectors.query(upcast(torch.cat([ours[student.inputs], ours[student.labels]], 1)))
    keys = upcast(torch.cat([theirs[teacher.inputs], theirs[teacher.labels]], 1)) / teacher.space.std_index
    return queries, keys


def _select(matches: Tensor, values: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One-hot attention: (N, d) and (M, D), zero in rows without a match, and masks (N,) and (M,) of those with one."""
    matched = matches >= 0
    rows = matches[matched]
    to_student = torch.where(matched[:, None], values[matches.clamp(min=0)], 0)  # (N, d)
    to_teacher = states.new_zeros(len(values), states.shape[1]).index_copy(0, rows, states[matched])  # (M, D)
    teacher_matched = values.new_zeros(len(values)).index_fill(0, rows, 1)
    return to_student, to_teacher, matched.to(values.dtype), teacher_matched


def _padded_places(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where each row of ragged samples lies in (B * longest,)."""
    longest = max(sizes)
    return torch.tensor([b * longest + i for b, size in enumerate(sizes) for i in range(size)], device=device)


def _pad(rows: Tensor, sizes: Sequence[int], places: Tensor) -> Tensor:
    """(B, longest, width) of ragged rows (., width), zero in the padding."""
    padded = rows.new_zeros(len(sizes) * max(sizes), rows.shape[1]).index_copy(0, places, rows)
    return padded.view(len(sizes), max(sizes), -1)
