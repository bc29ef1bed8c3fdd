"""Where a teacher's distributions come from during training. All sources share one face, :class:`Source`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from llmfusion.artifacts import Artifact
from llmfusion.errors import UserError
from llmfusion.fusion.losses import TeacherRows
from llmfusion.models.loading import load_tokenizer, vocabulary_sha256
from llmfusion.teachers.cache import Cache


class Source(Protocol):
    """A teacher as the trainer sees it."""

    name: str

    def batch(self, samples: Sequence[str], labels: Sequence[Sequence[int]]) -> TeacherRows:
        """The rows of these samples, in order; ``labels`` are the student's label ids of each."""
        ...


class HiddenRows:
    """Hidden states times the teacher's head: exact distributions, recomputed when they are needed."""

    def __init__(self, hidden: Tensor, source: "CachedSource", entropy: Tensor, cross_entropy: Tensor, mask: Tensor):
        self.hidden, self.source = hidden, source
        self.entropy, self.cross_entropy, self.mask = entropy, cross_entropy, mask

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        """``(c, V)``: softmax over the shared tokens only; the others get -inf, never a zero logit."""
        source = self.source
        logits = functional.linear(self.hidden[rows].float(), source.head, source.bias)  # (c, V_teacher)
        shared = functional.log_softmax(logits[:, source.shared] / temperature, dim=-1)
        out = shared.new_full((len(shared), source.vocabulary), -torch.inf)
        out[:, source.shared] = shared
        return out


class CachedSource:
    """A teacher that shares the student's vocabulary, from its cache of final hidden states.

    Raises :class:`UserError` if the vocabularies differ: such a teacher needs a projection into the student's space.
    """

    def __init__(self, name: str, cache: Artifact, tokenizer: Any, vocabulary: int, device: str):
        self.name, self.cache, self.device = name, Cache(cache), device
        other = load_tokenizer(cache, None)
        if vocabulary_sha256(other) != vocabulary_sha256(tokenizer):
            raise UserError(
                f"teacher {name} has another vocabulary than the student ({len(other)} and {len(tokenizer)} tokens, {cache.folder}): fusing across "
                "vocabularies (DSKD with cross-model attention) is not in this version; take a teacher with the student's tokenizer"
            )
        self.vocabulary = vocabulary
        head, bias = self.cache.head()
        self.head = head.float().to(device)
        self.bias = None if bias is None else bias.float().to(device)
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        shared = sorted(i for token, i in theirs.items() if ours.get(token) == i and i < min(vocabulary, len(head)))
        self.shared = torch.tensor(shared, device=device)
        self.all_shared = len(shared) == self.cache.facts["rows_of_head"]
        self.end, self.other_end = tokenizer.eos_token_id, other.eos_token_id

    def batch(self, samples: Sequence[str], labels: Sequence[Sequence[int]]) -> HiddenRows:
        """Rows of the given samples; raises :class:`UserError` naming a sample the cache lacks or labels differently."""
        found = [self.cache.rows(sample) for sample in samples]
        mask = torch.cat([self._agree(s, y, r["label_id"]) for s, y, r in zip(samples, labels, found, strict=True)]).to(self.device)
        hidden = torch.cat([r["hidden"] for r in found]).to(self.device)
        entropy = torch.cat([r["entropy"] for r in found]).to(self.device)
        cross_entropy = -torch.cat([r["label_logprob"] for r in found]).to(self.device)
        rows = HiddenRows(hidden, self, entropy, cross_entropy, mask)
        if not self.all_shared:  # the cached statistics are over tokens the student lacks: take them over the shared ones
            self._restate(rows, torch.tensor([y for sample in labels for y in sample], device=self.device))
        return rows

    def _agree(self, sample: str, ours: Sequence[int], theirs: Tensor) -> Tensor:
        """1 where label ids are equal; 0 where both close the response, each with its own end token."""
        mine = torch.tensor(ours, dtype=theirs.dtype)
        same = mine == theirs if len(mine) == len(theirs) else torch.zeros(0, dtype=torch.bool)
        closing = (mine == self.end) & (theirs == self.other_end) if len(mine) == len(theirs) else same
        if len(mine) != len(theirs) or not bool((same | closing).all()):
            raise UserError(f"teacher {self.name}: sample {sample}: its cached labels are not the student's; capture it again")
        return same.float()

    def _restate(self, rows: HiddenRows, labels: Tensor) -> None:
        log_q = rows.log_probs(slice(0, len(labels)), 1.0)
        rows.entropy = -(log_q.exp() * log_q.masked_fill(log_q.isinf(), 0)).sum(-1)
        known = log_q.gather(1, labels[:, None])[:, 0]
        rows.mask = rows.mask * known.isfinite()
        rows.cross_entropy = -known.masked_fill(known.isinf(), 0)
