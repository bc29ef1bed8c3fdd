"""Where a teacher's distributions come from during training. All sources share one face, :class:`Teacher`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import Encoded
from llmfusion.data.samples import Sample
from llmfusion.errors import UserError
from llmfusion.fusion.distributions import HiddenStateDistribution, TopKDistribution, Vocabulary
from llmfusion.fusion.dskd import (
    DualSpace,
    OwnScores,
    Projectors,
    StudentBatch,
    TeacherBatch,
    TeacherSpace,
    dual_space,
    input_ids,
)
from llmfusion.fusion.fused_loss import TeacherDistribution
from llmfusion.fusion.head import chunk_for, head_for_device
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


@dataclass(frozen=True)
class TokenizedSample:
    """A sample of a batch, as it is and as the student reads it."""

    sample: Sample
    encoded: Encoded


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher at the N label rows of a batch; ``space`` holds the terms of a teacher that had to be projected."""

    rows: TeacherDistribution
    space: DualSpace | None = None


class Teacher(Protocol):
    """A teacher as the trainer sees it."""

    name: str

    def projectors(self, width: int) -> Projectors | None:
        """New projectors into a student's space of ``width``, for a teacher that needs them."""
        ...

    def view(
        self, drawn: Sequence[TokenizedSample], student: StudentBatch, projectors: Projectors | None, temperature: float
    ) -> TeacherOutput:
        """The teacher at the label rows of these samples, in order."""
        ...

    def rows_of(self, drawn: Sequence[TokenizedSample]) -> int:
        """The teacher's own number of label rows in these samples."""
        ...

    def prefetch(self, drawn: Sequence[TokenizedSample]) -> None:
        """Told before the samples are asked for, so that a slow disk need not be waited for."""
        ...


class CachedTeacher:
    """A teacher that shares the student's vocabulary, from its cache of final hidden states or most likely tokens.

    Raises :class:`UserError` if the vocabularies differ: such a teacher is a :class:`ProjectedTeacher`.
    """

    def __init__(
        self,
        name: str,
        cache: Artifact,
        tokenizer: Any,
        vocabulary: int,
        device: str,
        states: HiddenStateSource | None = None,
    ):
        self.name, self.cache, self.device = name, TeacherCache(cache, states), device
        other = load_tokenizer(cache, None)
        if vocabulary_sha256(other) != vocabulary_sha256(tokenizer):
            raise UserError(
                f"teacher {name} has another vocabulary than the student ({len(other)} and {len(tokenizer)} tokens, {cache.folder})"
            )
        head, bias = self.cache.head()
        bias = None if bias is None else bias.float().to(device)
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        shared = sorted(i for token, i in theirs.items() if ours.get(token) == i and i < min(vocabulary, len(head)))
        head = head_for_device(head, device)
        self.own = Vocabulary(head, bias, torch.tensor(shared, device=device), vocabulary)
        self.all_shared = len(shared) == self.cache.facts["rows_of_head"]
        self.end, self.other_end = tokenizer.eos_token_id, other.eos_token_id
        self._uncompared: tuple[Tensor, Tensor | None] | None = (head, bias)

    def projectors(self, width: int) -> None:
        """None: what it says is in the student's vocabulary already."""

    def view(
        self, drawn: Sequence[TokenizedSample], student: StudentBatch, projectors: Projectors | None, temperature: float
    ) -> TeacherOutput:
        """Its distributions over the tokens both know."""
        return TeacherOutput(self.batch([d.sample for d in drawn], [d.encoded.label_ids for d in drawn]))

    def rows_of(self, drawn: Sequence[TokenizedSample]) -> int:
        """The student's: they share label positions."""
        return sum(len(d.encoded.label_ids) for d in drawn)

    def prefetch(self, drawn: Sequence[TokenizedSample]) -> None:
        """Have the cache's rows of these samples read."""
        self.cache.prefetch([d.sample["id"] for d in drawn])

    def batch(
        self, samples: Sequence[Sample], labels: Sequence[Sequence[int]]
    ) -> HiddenStateDistribution | TopKDistribution:
        """Rows of the given samples; raises :class:`UserError` naming a sample the cache lacks or labels differently."""
        found = self.cache.batch(samples)
        mask = torch.cat(
            [self._agree(s["id"], y, r["label_id"]) for s, y, r in zip(samples, labels, found, strict=True)]
        ).to(self.device)
        together = {name: torch.cat([r[name] for r in found]).to(self.device) for name in found[0]}
        if self._uncompared:
            require_recomputed(self.name, self.cache, together, *self._uncompared)
            self._uncompared = None
        stats = together["entropy"], -together["label_logprob"], mask
        if self.cache.kind == "topk":  # its statistics cannot be taken again: they stay those over its own tokens
            return TopKDistribution(together["top_id"], together["top_logprob"], self.own, *stats)
        rows = HiddenStateDistribution(
            together["hidden"], self.own, *stats, is_own_entropy=self.cache.kind == "hidden"
        )  # not those of a teacher that is run again
        if (
            not self.all_shared
        ):  # the cached statistics are over tokens the student lacks: take them over the shared ones
            self._restate(rows, torch.tensor([y for sample in labels for y in sample], device=self.device))
        return rows

    def _agree(self, sample: str, ours: Sequence[int], theirs: Tensor) -> Tensor:
        """1 where label ids are equal; 0 where both close the response, each with its own end token."""
        mine = torch.tensor(ours, dtype=theirs.dtype)
        same = mine == theirs if len(mine) == len(theirs) else torch.zeros(0, dtype=torch.bool)
        closing = (mine == self.end) & (theirs == self.other_end) if len(mine) == len(theirs) else same
        if len(mine) != len(theirs) or not bool((same | closing).all()):
            raise UserError(
                f"teacher {self.name}: sample {sample}: its cached labels are not the student's; capture it again"
            )
        return same.float()

    def _restate(self, rows: HiddenStateDistribution, labels: Tensor) -> None:
        entropies, known = [], []
        for part in torch.arange(len(labels)).split(chunk_for(rows.own.head)):
            some = slice(int(part[0]), int(part[-1]) + 1)
            log_q = rows.log_probs(some, 1.0)
            known.append(log_q.gather(1, labels[some, None])[:, 0])
            entropies.append(
                -torch.linalg.vecdot(log_q.exp(), log_q.clamp_(min=torch.finfo(log_q.dtype).min))
            )  # not 0 x -inf
        rows.entropy, label, rows.is_own_entropy = torch.cat(entropies), torch.cat(known), True
        rows.mask = rows.mask * label.isfinite()
        rows.cross_entropy = -label.masked_fill(label.isinf(), 0)


class ProjectedTeacher:
    """A teacher of another vocabulary, projected into the student's space (:mod:`llmfusion.fusion.dskd`).

    ``align: cma`` lets attention find which rows belong together; ``exact`` takes rows whose labels cover the same text.
    ``score: own`` scores the teacher by its cached statistics instead of by its projection.
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
        self.name, self.cache, self.device, self.exact, self.own = (
            name,
            TeacherCache(cache, states),
            device,
            align == "exact",
            score == "own",
        )
        if self.cache.kind == "topk":
            raise UserError(
                f"teacher {name} has another vocabulary than the student, and its cache of kind topk has no states to project; capture it as hidden"
            )
        head, bias = self.cache.head()
        facts, known = cache.facts, cache.facts["rows_of_head"]
        bias = None if bias is None else bias[:known].float().to(device)
        stds = [facts[f"std_{name}"] for name in ("index_embedding", "target_embedding", "hidden")]
        self.space = TeacherSpace(
            head_for_device(head[:known], device), bias, self.cache.embedding().float().to(device), *stds
        )
        if self.exact or self.own:
            self.pieces, self.student_pieces = token_bytes(load_tokenizer(cache, None)), token_bytes(tokenizer)
        self._spans: dict[str, tuple[Tensor, Tensor]] = {}
        self._compared = False

    def projectors(self, width: int) -> Projectors:
        """Fresh ones; cross-model attention needs a query, exact alignment none."""
        return Projectors(width, self.space.head.shape[1], attention=not self.exact)

    def rows_of(self, drawn: Sequence[TokenizedSample]) -> int:
        """Label rows of its own tokenisation, from the cache's index."""
        return sum(self.cache.entry(d.sample["id"])["length"] for d in drawn)

    def prefetch(self, drawn: Sequence[TokenizedSample]) -> None:
        """Have the cache's rows of these samples read."""
        self.cache.prefetch([d.sample["id"] for d in drawn])

    def view(
        self, drawn: Sequence[TokenizedSample], student: StudentBatch, projectors: Projectors | None, temperature: float
    ) -> TeacherOutput:
        """Its projection at the student's rows, with the terms that train the projectors."""
        assert projectors is not None
        entries = [self._entry(d) for d in drawn]
        found = self.cache.batch([d.sample for d in drawn])
        labels = [rows["label_id"].long() for rows in found]
        inputs = [input_ids(y, e["segment_starts"], e["segment_prompts"]) for y, e in zip(labels, entries, strict=True)]
        sizes = [len(y) for y in labels]
        hidden, x, y = (
            torch.cat(parts).to(self.device) for parts in ([rows["hidden"] for rows in found], inputs, labels)
        )
        if not self._compared:
            told = torch.cat([rows["label_logprob"] for rows in found]).to(self.device)
            require_recomputed(
                self.name,
                self.cache,
                {"hidden": hidden, "label_id": y, "label_logprob": told},
                self.space.head,
                self.space.bias,
            )
            self._compared = True
        teacher = TeacherBatch(self.space, hidden, x, y, sizes)
        spans = (
            [self._spans_of(d, y, e) for d, y, e in zip(drawn, labels, entries, strict=True)]
            if self.exact or self.own
            else []
        )
        matched = (
            join_matches([match_spans(ours, theirs) for ours, theirs in spans], sizes).to(self.device)
            if self.exact
            else None
        )
        own = self._own(spans, found) if self.own else None
        space = dual_space(projectors, student, teacher, temperature, matched, own, products=student.products)
        return TeacherOutput(space.rows, space)

    def _entry(self, drawn: TokenizedSample) -> dict[str, Any]:
        entry = self.cache.entry(drawn.sample["id"])
        if entry["response_sha256"] != response_sha256(drawn.sample):
            raise UserError(
                f"teacher {self.name}: sample {drawn.sample['id']}: its cached response is not the mix's; capture it again"
            )
        return entry

    def _spans_of(self, drawn: TokenizedSample, labels: Tensor, entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Byte spans of the student's and of the teacher's label rows; they never change, so they are kept."""
        name = drawn.sample["id"]
        if name not in self._spans:
            texts = responses(drawn.sample)
            ours = row_spans(self.student_pieces, drawn.encoded.label_ids, drawn.encoded.segments()[0], texts)
            self._spans[name] = ours, row_spans(self.pieces, labels.tolist(), entry["segment_starts"], texts)
        return self._spans[name]

    def _own(self, spans: Sequence[tuple[Tensor, Tensor]], found: Sequence[dict[str, Tensor]]) -> OwnScores:
        values = [torch.stack([rows["entropy"], -rows["label_logprob"]], 1) for rows in found]  # (M, 2) a sample
        parts = [redistribute_by_bytes(ours, theirs, said) for (ours, theirs), said in zip(spans, values, strict=True)]
        scores, mask = (torch.cat(column).to(self.device) for column in zip(*parts, strict=True))
        return OwnScores(scores[:, 0], scores[:, 1], mask)


def load_teacher(
    name: str,
    cache: Artifact,
    tokenizer: Any,
    vocabulary: int,
    device: str,
    fusion: FusionOptions,
    states: HiddenStateSource | None = None,
) -> Teacher:
    """The source that a teacher's vocabulary asks for, with the fusion's options for projected ones."""
    if vocabulary_sha256(load_tokenizer(cache, None)) == vocabulary_sha256(tokenizer):
        return CachedTeacher(name, cache, tokenizer, vocabulary, device, states)
    return ProjectedTeacher(name, cache, tokenizer, device, fusion.align, fusion.score, states)
