"""From encoded samples to padded tensors, and the positions that predict labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmfusion.data.chat import Encoded


def default_device() -> str:
    """The device this process computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pad(ids: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask, both (B, T) int64; padding holds id 0 and is masked."""
    longest = max(map(len, ids))
    padded = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return padded.to(device), mask.to(device)


def label_positions(encoded: Encoded) -> list[int]:
    """Positions in the sample whose state predicts a label: one before each label token."""
    return [position - 1 for position, label in enumerate(encoded.is_label) if label]
