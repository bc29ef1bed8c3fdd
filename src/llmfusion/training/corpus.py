"""Encoded samples and their order: a pure function of seed and epoch, so a resumed run sees what it would have seen."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample, encode
from llmfusion.data.samples import read_jsonl
from llmfusion.data.sources import Rejected
from llmfusion.errors import UserError
from llmfusion.fusion.teacher import Teacher
from llmfusion.study.schema.training import Training


class Corpus:
    """All usable samples of one or more mixes, tokenised by the student."""

    def __init__(self, mixes: Sequence[Artifact], tokenizer: Any):
        self.samples: list[TokenizedSample] = []
        self.rejected = Rejected()
        for mix in mixes:
            for sample in read_jsonl(mix.file("samples.jsonl")):
                found = encode(sample, tokenizer, mix.facts["max_length"])
                if isinstance(found, str):
                    self.rejected.add(found, sample["id"])
                    continue
                self.samples.append(TokenizedSample(sample, found.compact()))

    def __len__(self) -> int:
        return len(self.samples)

    def steps(self, run: Training) -> int:
        """Optimizer steps of a training: as asked, or epochs of full batches (the last, smaller one is left out)."""
        size = run.batch_size
        per_epoch = len(self) // size
        if not per_epoch:
            raise UserError(
                f"{len(self)} usable samples do not fill one batch of {size}; rejected: {dict(self.rejected.counts) or 'none'}"
            )
        return run.steps or (run.epochs or 0) * per_epoch

    def batches(self, run: Training, first_step: int, steps: int) -> Iterator[tuple[int, list[int]]]:
        """``(step, sample numbers)`` from ``first_step`` on."""
        size = run.batch_size
        per_epoch = len(self) // size
        order, of_epoch = torch.empty(0), -1
        for step in range(first_step, steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != of_epoch:
                generator = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
                order, of_epoch = torch.randperm(len(self), generator=generator), epoch
            yield step, order[place * size : (place + 1) * size].tolist()


def read_ahead(
    steps: Iterator[tuple[int, list[int]]],
    part: Callable[[list[int]], Sequence[TokenizedSample]],
    sources: Sequence[Teacher],
) -> Iterator[tuple[int, list[int]]]:
    """The same steps; before each is given out, the sources are told of the one behind it: of this process's ``part`` of its samples."""
    current = next(steps, None)
    while current is not None:
        following = next(steps, None)
        if following is not None:
            drawn = part(following[1])
            for source in sources:
                source.prefetch(drawn)
        yield current
        current = following
