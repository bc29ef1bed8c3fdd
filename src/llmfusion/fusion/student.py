"""The student's side of a batch, as losses and teachers see it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StudentBatch:
    """The student's label rows in the samples of a batch, and its parameters.

    ``hidden (N, d)`` are the final states at the positions that predict ``labels (N,)``; ``inputs (N,)`` are the tokens
    at those positions; ``sizes``: label rows of each sample, at least 1. ``embedding (v, d)``, ``head (v, d)``, ``bias
    (v,)``; ``matmul_dtype``: what heads are multiplied in, if not in the precision of the states.
    """

    hidden: Tensor
    inputs: Tensor
    labels: Tensor
    sizes: Sequence[int]
    embedding: Tensor
    head: Tensor
    bias: Tensor | None = None
    matmul_dtype: torch.dtype | None = None
