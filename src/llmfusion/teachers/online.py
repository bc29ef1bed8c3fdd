"""A teacher in memory: the states of a cache of kind ``online``, computed when a batch is used."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import Encoded, encode
from llmfusion.data.samples import Sample
from llmfusion.errors import UserError
from llmfusion.models.batches import label_positions, pad
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.study.schema.settings import Capture


class OnlineHiddenStates:
    """The teacher's own forward pass, in the precision of its capture, over batches as large as the capture's."""

    def __init__(self, name: str, teacher: Artifact, cache: Artifact, mix: Artifact, device: str):
        capture = Capture.model_validate(cache.spec["capture"])
        self.name = name
        self.device = device
        self.max_length = mix.facts["max_length"]
        self.batch_size = capture.batch_size
        self.tokenizer = load_tokenizer(cache, None)
        self.trunk = load_model(teacher, capture.dtype).base_model.to(device)  # its head lies in the cache

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Final hidden states at the label positions of each sample, (n, d)."""
        encoded = [self._encode(sample) for sample in samples]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))  # so that little is padded
        states: list[Tensor] = [torch.empty(0)] * len(encoded)
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            ids, attention = pad([encoded[i].ids for i in batch], self.device)  # (B, T)
            hidden = self.trunk(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
            for row, i in enumerate(batch):
                states[i] = hidden[row, label_positions(encoded[i])]  # (n, d)
        return states

    def _encode(self, sample: Sample) -> Encoded:
        encoded = encode(sample, self.tokenizer, self.max_length)
        if isinstance(encoded, str):
            raise UserError(f"teacher {self.name}: sample {sample['id']}: {encoded}; capture it again")
        return encoded


def online_source(
    name: str, cache: Artifact, mix: Artifact, teacher: Artifact | None, device: str
) -> OnlineHiddenStates | None:
    """The teacher in memory for a cache of kind ``online``, whose states are not stored; None for the other kinds.

    Raises :class:`UserError` where the teacher is needed and is None.
    """
    if cache.facts["kind"] != "online":
        return None
    if teacher is None:
        raise UserError(
            f"teacher {name}: its cache holds no states (kind online), "
            "and the teacher is not among this training's inputs"
        )
    return OnlineHiddenStates(name, teacher, cache, mix, device)
