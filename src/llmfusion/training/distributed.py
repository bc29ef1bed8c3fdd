"""One training by several processes of a node: each takes a part of every step's samples, the gradients are summed.

The loss of a sample is divided by counts of the whole step (:class:`llmfusion.fusion.objective.StepTokenCounts`), so
the sum over processes is what one process computes, up to the order of additions. All processes hold the whole model
and make the same update, or each updates its shard (:mod:`llmfusion.training.sharding`); only the first one writes
results. A single process needs no process group: then nothing here communicates.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from llmfusion.errors import UserError

TIMEOUT = timedelta(hours=2)  # of a collective: the others wait while the first process saves


def rank() -> int:
    """Number of this process, 0 for the one that writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun started; on a GPU node each takes the device of its local rank.

    Raises :class:`UserError` where there are fewer GPUs than processes.
    """
    if torch.cuda.is_available():
        number = int(os.environ["WORLD_SIZE"])
        devices = torch.cuda.device_count()
        if devices < number:
            raise UserError(f"{number} processes need a GPU each, there are {devices}: change the model's `processes`")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    yield
    distributed.destroy_process_group()  # not after an error: the others may not answer, and the process ends anyway


def seed_step(seed: int, step: int) -> None:
    """With several processes, seed dropout by seed, step and rank: resuming needs no random state of each process."""
    if world_size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank())


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over processes; a process without one where another has one adds zeros."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    distributed.all_reduce(has_gradient, distributed.ReduceOp.MAX)
    for parameter, used in zip(parameters, has_gradient.tolist(), strict=True):
        if used:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            distributed.all_reduce(parameter.grad)


def all_reduce_record(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers by (nested) name, summed over processes."""
    if world_size() == 1:
        return record
    values = torch.tensor(list(_leaves(record)), dtype=torch.float64)
    distributed.all_reduce(values)
    return _filled(record, iter(values.tolist()))


def any_across_ranks(*flags: bool) -> list[bool]:
    """For each flag whether it is set in any process: all of them decide alike."""
    if world_size() == 1:
        return list(flags)
    is_set = torch.tensor(flags, dtype=torch.uint8)
    distributed.all_reduce(is_set, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in is_set]


def barrier() -> None:
    """Wait until all processes are here."""
    any_across_ranks(False)


def _leaves(record: dict[str, Any]) -> Iterator[float]:
    for _, value in sorted(record.items()):
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield float(value)


def _filled(record: dict[str, Any], values: Iterator[float]) -> dict[str, Any]:
    return {
        name: _filled(value, values) if isinstance(value, dict) else next(values)
        for name, value in sorted(record.items())
    }
