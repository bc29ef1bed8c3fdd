"""A teacher in memory: the states of a cache of kind ``online``, computed when a batch is seen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import encode
from llmfusion.data.samples import Sample
from llmfusion.errors import UserError, require
from llmfusion.models.batches import label_positions, pad
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.study.schema.settings import Capture


class Online:
    """The teacher's own forward pass, in the precision of its capture, over batches as large as the capture's."""

    def __init__(self, name: str, teacher: Artifact, cache: Artifact, mix: Artifact, device: str):
        settings = Capture.model_validate(cache.spec["capture"])
        self.name, self.device, self.longest = name, device, mix.facts["max_length"]
        self.tokenizer, self.size = load_tokenizer(cache, None), settings.batch_size
        self.trunk = load_model(teacher, settings.dtype).base_model.to(device)  # its head lies in the cache

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Final states at the label rows of each sample, (n, d)."""
        encoded = [self._encoded(sample) for sample in samples]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))  # by length, so that little is padded
        out: list[Tensor] = [torch.empty(0)] * len(encoded)
        for start in range(0, len(order), self.size):
            batch = order[start : start + self.size]
            ids, attention = pad([encoded[i].ids for i in batch], self.device)
            hidden = self.trunk(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
            for row, i in enumerate(batch):
                out[i] = hidden[row, label_positions(encoded[i])]
        return out

    def _encoded(self, sample: Sample) -> Any:
        found = encode(sample, self.tokenizer, self.longest)
        if isinstance(found, str):
            raise UserError(f"teacher {self.name}: sample {sample['id']}: {found}; capture it again")
        return found


def states_of(name: str, cache: Artifact, mix: Artifact, teacher: Artifact | None, device: str) -> Online | None:
    """What a cache needs to be whole: the teacher in memory where the states are not stored, else nothing."""
    if cache.facts["kind"] != "online":
        return None
    require(
        teacher is not None,
        f"teacher {name}: its cache holds no states (kind online), and the teacher is not among this training's inputs",
    )
    assert teacher is not None
    return Online(name, teacher, cache, mix, device)
