"""Tokenized samples and their order.

The order is a pure function of seed and epoch, so that a resumed run sees what it would have seen.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample, encode
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import read_samples
from llmfusion.errors import UserError
from llmfusion.fusion.teacher import Teacher
from llmfusion.study.schema.training import Training

Batches = Iterator[tuple[int, list[int]]]  # an optimizer step, and the indices of its samples in the corpus


class Corpus:
    """All usable samples of one or more mixes, tokenized by the student."""

    def __init__(self, mixes: Sequence[Artifact], tokenizer: Any):
        self.samples: list[TokenizedSample] = []
        self.rejected = Rejected()
        for mix in mixes:
            for sample in read_samples(mix.file("samples.jsonl")):
                encoded = encode(sample, tokenizer, mix.facts["max_length"])
                if isinstance(encoded, str):  # the reason why not
                    self.rejected.add(encoded, sample["id"])
                else:
                    self.samples.append(TokenizedSample(sample, encoded.compact()))

    def __len__(self) -> int:
        return len(self.samples)

    def steps(self, run: Training) -> int:
        """Optimizer steps of a training: ``run.steps``, or epochs of full batches (the last, smaller one is left out).

        Raises :class:`UserError` where the samples do not fill one batch.
        """
        steps_per_epoch = len(self) // run.batch_size
        if not steps_per_epoch:
            rejected = dict(self.rejected.counts) or "none"
            raise UserError(
                f"{len(self)} usable samples do not fill one batch of {run.batch_size}; rejected: {rejected}"
            )
        return run.steps or (run.epochs or 0) * steps_per_epoch

    def batches(self, run: Training, first_step: int, steps: int) -> Batches:
        """``(step, indices of its samples)`` from ``first_step`` on, ``steps`` excluded."""
        size = run.batch_size
        steps_per_epoch = len(self) // size
        order = torch.empty(0)
        epoch_of_order = -1
        for step in range(first_step, steps):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != epoch_of_order:
                generator = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
                order = torch.randperm(len(self), generator=generator)
                epoch_of_order = epoch
            yield step, order[place * size : (place + 1) * size].tolist()


def read_ahead(
    batches: Batches, local_samples: Callable[[list[int]], Sequence[TokenizedSample]], teachers: Sequence[Teacher]
) -> Batches:
    """The same batches; before each is yielded, teachers prefetch this process's ``local_samples`` of the next one."""
    current = next(batches, None)
    while current is not None:
        following = next(batches, None)
        if following is not None:
            samples = local_samples(following[1])
            for teacher in teachers:
                teacher.prefetch(samples)
        yield current
        current = following
