"""Where a teacher's distributions come from during training. All teachers implement one interface, :class:`Teacher`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample, closings
from llmfusion.data.samples import Sample
from llmfusion.errors import UserError
from llmfusion.fusion.distributions import HiddenStateDistribution, TeacherHead, TopKDistribution
from llmfusion.fusion.dskd import DualSpace, OwnScores, Projectors, TeacherBatch, TeacherSpace, dual_space, input_ids
from llmfusion.fusion.fused_loss import TeacherDistribution
from llmfusion.fusion.head import chunk_rows, head_for_device
from llmfusion.fusion.student import StudentBatch
from llmfusion.models.loading import load_tokenizer, vocabulary_sha256
from llmfusion.study.schema.options import FusionOptions
from llmfusion.teachers.alignment import (
    join_matches,
    match_spans,
    redistribute_by_bytes,
    responses,
    row_spans,
    token_bytes,
)
from llmfusion.teachers.cache import HiddenStateSource, TeacherCache
from llmfusion.teachers.cache_format import response_sha256
from llmfusion.teachers.fingerprint import require_recomputed

Spans = tuple[Tensor, Tensor]  # byte spans of the student's (N, 2) and of the teacher's (M, 2) label rows in a sample


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's distribution at the N label rows of a batch; ``dual_space``: the loss terms of a projected one."""

    distribution: TeacherDistribution
    dual_space: DualSpace | None = None


class Teacher(Protocol):
    """A teacher as the trainer sees it."""

    name: str

    def projectors(self, student_width: int) -> Projectors | None:
        """New projectors into a student's space of this width, for a teacher that needs them."""
        ...

    def output(
        self,
        batch: Sequence[TokenizedSample],
        student: StudentBatch,
        projectors: Projectors | None,
        temperature: float,
    ) -> TeacherOutput:
        """The teacher at the label rows of these samples, in order."""
        ...

    def label_count(self, batch: Sequence[TokenizedSample]) -> int:
        """The number of label rows in these samples, in the teacher's own tokens."""
        ...

    def prefetch(self, batch: Sequence[TokenizedSample]) -> None:
        """Called before ``output`` needs these samples, so that a slow disk need not be waited for."""
        ...


class CachedTeacher:
    """A teacher that shares the student's vocabulary, from its cache of final hidden states or most likely tokens.

    ``states`` computes the states of a teacher whose cache holds none. Raises :class:`UserError` if the vocabularies
    differ: such a teacher is a :class:`ProjectedTeacher`.
    """

    def __init__(
        self,
        name: str,
        cache: Artifact,
        tokenizer: Any,
        vocabulary_size: int,
        device: str,
        states: HiddenStateSource | None = None,
    ):
        self.name = name
        self.cache = TeacherCache(cache, states)
        self.device = device
        teacher_tokenizer = load_tokenizer(cache, None)
        _require_same_vocabulary(name, cache, tokenizer, teacher_tokenizer)
        weight, bias = self.cache.head()
        bias = None if bias is None else bias.float().to(device)
        shared = _shared_ids(tokenizer, teacher_tokenizer, min(vocabulary_size, len(weight)))
        weight = head_for_device(weight, device)
        self.head = TeacherHead(weight, bias, torch.tensor(shared, device=device), vocabulary_size)
        self.shares_all_tokens = len(shared) == self.cache.facts["rows_of_head"]
        self.student_closings = closings(tokenizer)
        self.teacher_closings = closings(teacher_tokenizer)
        self._unchecked_head: tuple[Tensor, Tensor | None] | None = (weight, bias)  # until the first batch is read

    def projectors(self, student_width: int) -> None:
        """None: its distributions are over the student's vocabulary already."""

    def output(
        self,
        batch: Sequence[TokenizedSample],
        student: StudentBatch,
        projectors: Projectors | None,
        temperature: float,
    ) -> TeacherOutput:
        """Its distributions over the tokens both know."""
        return TeacherOutput(self.distribution([s.sample for s in batch], [s.encoded.label_ids for s in batch]))

    def label_count(self, batch: Sequence[TokenizedSample]) -> int:
        """The student's: they share label positions."""
        return sum(len(s.encoded.label_ids) for s in batch)

    def prefetch(self, batch: Sequence[TokenizedSample]) -> None:
        """Have the cache's rows of these samples read."""
        self.cache.prefetch([s.sample["id"] for s in batch])

    def distribution(
        self, samples: Sequence[Sample], labels: Sequence[Sequence[int]]
    ) -> HiddenStateDistribution | TopKDistribution:
        """The teacher at the label rows of ``samples``, whose label ids are ``labels``.

        Raises :class:`UserError` naming a sample that the cache lacks or labels differently.
        """
        parts = self.cache.batch(samples)
        matched = [self._match(s, y, p["label_id"]) for s, y, p in zip(samples, labels, parts, strict=True)]
        mask = torch.cat([same for _, same in matched]).to(self.device)  # (N,)
        parts = [
            {name: rows if indices is None else rows[indices] for name, rows in part.items()}
            for part, (indices, _) in zip(parts, matched, strict=True)
        ]
        rows = {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}
        if self._unchecked_head:
            require_recomputed(self.name, self.cache, rows, *self._unchecked_head)
            self._unchecked_head = None
        stats = rows["entropy"], -rows["label_logprob"], mask
        if self.cache.kind == "topk":  # its statistics cannot be computed again: they stay those over its own tokens
            return TopKDistribution(rows["top_id"], rows["top_logprob"], self.head, *stats)
        # of a teacher that is run again, the cached entropies are not those of these states
        is_own_entropy = self.cache.kind == "hidden"
        distribution = HiddenStateDistribution(rows["hidden"], self.head, *stats, is_own_entropy=is_own_entropy)
        if not self.shares_all_tokens:
            flat_labels = torch.tensor([y for sample in labels for y in sample], device=self.device)
            _recompute_stats(distribution, flat_labels)
        return distribution

    def _match(self, sample: Sample, labels: Sequence[int], cached: Tensor) -> tuple[Tensor | None, Tensor]:
        """The cached row of each label (n,), None for each its own; and 1 where both have the same label, else 0 (n,).

        Labels may differ where both close a response, each as its own template does.
        """
        theirs = cached.tolist()
        if theirs == list(labels):
            return None, torch.ones(len(labels))
        starts = self.cache.entry(sample["id"])["segment_starts"]
        rows: list[int] = []
        for start, stop in zip(starts, [*starts[1:], len(theirs)], strict=True):
            length = self._segment_length(labels[len(rows) :], theirs[start:stop])
            rows += [min(start + i, stop - 1) for i in range(length)]
        if len(rows) != len(labels):
            raise UserError(
                f"teacher {self.name}: sample {sample['id']}: its cached labels are not the student's; capture it again"
            )
        return torch.tensor(rows), (cached[rows] == torch.tensor(labels, dtype=cached.dtype)).float()

    def _segment_length(self, labels: Sequence[int], theirs: Sequence[int]) -> int:
        """How many of ``labels`` are the response of the teacher's segment and a closing; 0 if they are not."""
        for theirs_closing in self.teacher_closings:
            response = theirs[: len(theirs) - len(theirs_closing)]
            if [*response, *theirs_closing] != list(theirs) or list(labels[: len(response)]) != list(response):
                continue
            for closing in self.student_closings:
                length = len(response) + len(closing)
                if tuple(labels[len(response) : length]) == closing:
                    return length
        return 0


def _require_same_vocabulary(name: str, cache: Artifact, tokenizer: Any, teacher_tokenizer: Any) -> None:
    if vocabulary_sha256(teacher_tokenizer) != vocabulary_sha256(tokenizer):
        sizes = f"{len(teacher_tokenizer)} and {len(tokenizer)} tokens"
        raise UserError(f"teacher {name} has another vocabulary than the student ({sizes}, {cache.folder})")


def _shared_ids(tokenizer: Any, teacher_tokenizer: Any, limit: int) -> list[int]:
    """Ids below ``limit`` that stand for the same token in both vocabularies, sorted."""
    ours = tokenizer.get_vocab()
    theirs = teacher_tokenizer.get_vocab()
    return sorted(i for token, i in theirs.items() if ours.get(token) == i and i < limit)


def _recompute_stats(distribution: HiddenStateDistribution, labels: Tensor) -> None:
    """Replace the cached statistics, which are over tokens that the student lacks, by those over the shared ones."""
    entropies: list[Tensor] = []
    label_log_probs: list[Tensor] = []
    chunk = chunk_rows(distribution.head.weight)
    for start in range(0, len(labels), chunk):
        rows = slice(start, min(start + chunk, len(labels)))
        log_q = distribution.log_probs(rows, 1.0)  # (c, V)
        label_log_probs.append(log_q.gather(1, labels[rows, None])[:, 0])
        q = log_q.exp()
        entropies.append(-torch.linalg.vecdot(q, log_q.clamp_(min=torch.finfo(log_q.dtype).min)))  # not 0 x -inf
    label_log_prob = torch.cat(label_log_probs)
    distribution.entropy = torch.cat(entropies)
    distribution.is_own_entropy = True
    distribution.mask = distribution.mask * label_log_prob.isfinite()
    distribution.cross_entropy = -label_log_prob.masked_fill(label_log_prob.isinf(), 0)


class ProjectedTeacher:
    """A teacher of another vocabulary, projected into the student's space (:mod:`llmfusion.fusion.dskd`).

    ``align: cma`` lets attention find which rows belong together; ``exact`` takes rows whose labels cover the same
    text. ``score: own`` scores the teacher by its cached statistics instead of by its projection.
    """

    def __init__(
        self,
        name: str,
        cache: Artifact,
        tokenizer: Any,
        device: str,
        align: str = "cma",
        score: str = "projected",
        states: HiddenStateSource | None = None,
    ):
        self.name = name
        self.cache = TeacherCache(cache, states)
        self.device = device
        self.exact = align == "exact"
        self.own_scores = score == "own"
        if self.cache.kind == "topk":
            raise UserError(
                f"teacher {name} has another vocabulary than the student, and its cache of kind topk has no states to "
                "project; capture it as hidden"
            )
        self.space = self._teacher_space()
        if self.exact or self.own_scores:
            self.teacher_bytes = token_bytes(load_tokenizer(cache, None))
            self.student_bytes = token_bytes(tokenizer)
        self._spans: dict[str, Spans] = {}
        self._checked = False

    def _teacher_space(self) -> TeacherSpace:
        facts = self.cache.facts
        known = facts["rows_of_head"]
        weight, bias = self.cache.head()
        bias = None if bias is None else bias[:known].float().to(self.device)
        embedding = self.cache.embedding().float().to(self.device)
        stds = [facts[f"std_{name}"] for name in ("index_embedding", "target_embedding", "hidden")]
        return TeacherSpace(head_for_device(weight[:known], self.device), bias, embedding, *stds)

    def projectors(self, student_width: int) -> Projectors:
        """Fresh ones; cross-model attention needs a query, exact alignment none."""
        return Projectors(student_width, self.space.head.shape[1], attention=not self.exact)

    def label_count(self, batch: Sequence[TokenizedSample]) -> int:
        """Label rows of its own tokenisation, from the cache's index."""
        return sum(self.cache.entry(s.sample["id"])["length"] for s in batch)

    def prefetch(self, batch: Sequence[TokenizedSample]) -> None:
        """Have the cache's rows of these samples read."""
        self.cache.prefetch([s.sample["id"] for s in batch])

    def output(
        self,
        batch: Sequence[TokenizedSample],
        student: StudentBatch,
        projectors: Projectors | None,
        temperature: float,
    ) -> TeacherOutput:
        """Its projection at the student's rows, with the terms that train the projectors."""
        assert projectors is not None
        entries = [self._entry(sample) for sample in batch]
        rows = self.cache.batch([s.sample for s in batch])
        teacher = self._teacher_batch(rows, entries)
        self._check_once(rows, teacher)
        matches = own_scores = None
        if self.exact or self.own_scores:
            spans = [self._sample_spans(s, r, e) for s, r, e in zip(batch, rows, entries, strict=True)]
            matches = self._matches(spans, teacher.sizes) if self.exact else None
            own_scores = self._own_scores(spans, rows) if self.own_scores else None
        space = dual_space(projectors, student, teacher, temperature, matches, own_scores)
        return TeacherOutput(space.distribution, space)

    def _entry(self, sample: TokenizedSample) -> dict[str, Any]:
        entry = self.cache.entry(sample.sample["id"])
        if entry["response_sha256"] != response_sha256(sample.sample):
            name = sample.sample["id"]
            raise UserError(
                f"teacher {self.name}: sample {name}: its cached response is not the mix's; capture it again"
            )
        return entry

    def _teacher_batch(self, rows: Sequence[dict[str, Tensor]], entries: Sequence[dict[str, Any]]) -> TeacherBatch:
        labels = [part["label_id"].long() for part in rows]
        inputs = [input_ids(y, e["segment_starts"], e["segment_prompts"]) for y, e in zip(labels, entries, strict=True)]
        return TeacherBatch(
            self.space,
            hidden=torch.cat([part["hidden"] for part in rows]).to(self.device),  # (M, D)
            inputs=torch.cat(inputs).to(self.device),
            labels=torch.cat(labels).to(self.device),
            sizes=[len(y) for y in labels],
        )

    def _check_once(self, rows: Sequence[dict[str, Tensor]], teacher: TeacherBatch) -> None:
        """Compare the first batch's cached cross-entropies with recomputed ones."""
        if self._checked:
            return
        cached = torch.cat([part["label_logprob"] for part in rows]).to(self.device)
        first = {"hidden": teacher.hidden, "label_id": teacher.labels, "label_logprob": cached}
        require_recomputed(self.name, self.cache, first, self.space.head, self.space.bias)
        self._checked = True

    def _sample_spans(self, sample: TokenizedSample, rows: dict[str, Tensor], entry: dict[str, Any]) -> Spans:
        """Byte spans of the student's and of the teacher's label rows; they never change, so they are kept."""
        name = sample.sample["id"]
        if name not in self._spans:
            texts = responses(sample.sample)
            starts = sample.encoded.segments()[0]
            self._spans[name] = (
                row_spans(self.student_bytes, sample.encoded.label_ids, starts, texts),
                row_spans(self.teacher_bytes, rows["label_id"].tolist(), entry["segment_starts"], texts),
            )
        return self._spans[name]

    def _matches(self, spans: Sequence[Spans], sizes: Sequence[int]) -> Tensor:
        """The batch's teacher row of each student row, -1 for none, (N,)."""
        return join_matches([match_spans(ours, theirs) for ours, theirs in spans], sizes).to(self.device)

    def _own_scores(self, spans: Sequence[Spans], rows: Sequence[dict[str, Tensor]]) -> OwnScores:
        values = [torch.stack([part["entropy"], -part["label_logprob"]], 1) for part in rows]  # (m, 2) a sample
        parts = [redistribute_by_bytes(ours, theirs, v) for (ours, theirs), v in zip(spans, values, strict=True)]
        scores, mask = (torch.cat(column).to(self.device) for column in zip(*parts, strict=True))  # (N, 2), (N,)
        return OwnScores(scores[:, 0], scores[:, 1], mask)


def load_teacher(
    name: str,
    cache: Artifact,
    tokenizer: Any,
    vocabulary_size: int,
    device: str,
    fusion: FusionOptions,
    states: HiddenStateSource | None = None,
) -> Teacher:
    """A cached or a projected teacher, as its vocabulary and the student's ``tokenizer`` ask for.

    ``vocabulary_size``: rows of the student's head; ``fusion``: options for projected teachers.
    """
    if vocabulary_sha256(load_tokenizer(cache, None)) == vocabulary_sha256(tokenizer):
        return CachedTeacher(name, cache, tokenizer, vocabulary_size, device, states)
    return ProjectedTeacher(name, cache, tokenizer, device, fusion.align, fusion.score, states)
