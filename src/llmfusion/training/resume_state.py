"""Resume state: everything the next step depends on, in safetensors (no pickles), whole or not there at all.

One file and its hash, written by the first process; of a sharded model a file of each process with its part. Such a state counts
when all parts are there, and all processes take the same one.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmfusion.io.files import format_bytes
from llmfusion.errors import UserError
from llmfusion.io.files import sha256_file, write_file
from llmfusion.io.safetensors import layout_of
from llmfusion.training.distributed import any_across_ranks, barrier, rank, world_size
from llmfusion.training.sharding import is_sharded, local_shard

logger = logging.getLogger(__name__)
KEPT = 2  # the last one, and the one before in case the last is damaged
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def checkpoint_bytes(parameters: int, dtype: str) -> int:
    """Bytes of a saved model."""
    return WIDTH[dtype] * parameters


def first_state_bytes(parameters: int, folder: Path) -> int:
    """Bytes that a first resume state (weights and two moments in float32) needs beyond what is in ``folder``: without it a training could not be stopped."""
    return max(_state_bytes(parameters) - _bytes_in(folder), 0)


def warn_of_few_states(parameters: int, folder: Path) -> None:
    """Log where the disk cannot hold all states that are kept and the one that is being written."""
    most = (KEPT + 1) * _state_bytes(parameters)
    free = shutil.disk_usage(folder.parent).free
    if free + _bytes_in(folder) < most:
        place = folder.parent.resolve()
        logger.info(
            "resume states take up to %s, %s are free in %s: fewer will be kept",
            format_bytes(most),
            format_bytes(free),
            place,
        )


def _state_bytes(parameters: int) -> int:
    return 3 * WIDTH["float32"] * parameters


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


def save(
    folder: Path, step: int, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer, notes: Any
) -> Path | None:
    """Write the state after ``step`` optimizer steps: weights, moments, RNG, and ``notes`` (what JSON holds). All processes call.

    Returns what this process wrote. Raises :class:`UserError` where it does not fit, with the last state still there.
    """
    parts = _parts(model)
    if parts == 1 and rank() != 0:
        return None
    tensors = _tensors(model, optimizer)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, parts * sum(t.numel() * t.element_size() for t in tensors.values()))
    _together(parts)
    path = folder / _name(step, parts)
    _write(path, tensors, {"step": str(step), "fingerprint": fingerprint, "notes": json.dumps(notes)})
    _together(parts)
    if rank() == 0:
        for old in _steps(folder)[:-KEPT]:
            _forget(folder, old)
    return path


def restore(folder: Path, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, Any] | None:
    """Load the newest state of this very training that is sound in all processes. Returns its step and notes. All processes call.

    States of another spec or other inputs (``fingerprint``) are removed, and what killed writers left half-done; without
    a usable one the answer is None. Raises :class:`UserError` for parts of another number of processes, which are left.
    """
    parts = _parts(model)
    barrier()  # a writer that shares the folder has ended
    steps = _steps(folder)
    barrier()  # all have seen the same before the first tidies
    if rank() == 0:
        for left in folder.glob(".*.tmp"):  # each can be as large as a state
            left.unlink()
    for step in reversed(steps):
        _refuse_other_number(folder, step, parts)
        path = folder / _name(step, parts)
        wrong = _unusable(path, fingerprint)
        if wrong and (parts > 1 or rank() == 0):
            logger.info("%s %s", path, wrong)
        if not any_across_ranks(bool(wrong))[0]:
            return step, _load(path, model, optimizer)
        if rank() == 0:
            _forget(folder, step)
    return None


def _parts(model: Any) -> int:
    return world_size() if is_sharded(model) else 1


def _together(parts: int) -> None:
    if parts > 1:
        barrier()


def _name(step: int, parts: int) -> str:
    """``step-00000003.safetensors``, or the second of four parts: ``step-00000003.2-of-4.safetensors``."""
    return f"step-{step:08d}.{f'{rank() + 1}-of-{parts}.' if parts > 1 else ''}safetensors"


def _tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    names = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = local_shard(parameter.detach())
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{names[id(parameter)]}"] = state[key]
        tensors[f"step.{names[id(parameter)]}"] = torch.tensor(state["step"])
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], note: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        hashed = write_tensors(tensors, temporary, note)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half of a state on a full disk would keep it full
    write_file(_hash_of(path), hashed.encode())  # last: a state without its hash is not trusted


def write_tensors(tensors: dict[str, Tensor], path: Path, note: dict[str, str]) -> str:
    """Write a safetensors file, one tensor after the other: a copy of all would take as much host memory as a node's GPUs hold.

    Returns the file's sha256; it is on the disk then.
    """
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # so that each begins at a multiple of its width
    layout = layout_of(path, {name: (NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}, note)
    hashed = hashlib.sha256(layout.head)
    with open(path, "wb") as file:
        file.write(layout.head)
        for name in names:
            content = tensors[name].contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            file.write(content)
            hashed.update(content)
        file.flush()
        os.fsync(file.fileno())
    return hashed.hexdigest()


def _unusable(path: Path, fingerprint: str) -> str | None:
    """Why a state cannot be gone on from, in words."""
    if not path.exists() or not _hash_of(path).exists() or sha256_file(path).encode() != _hash_of(path).read_bytes():
        return "is damaged or was not finished; taking the one before"
    return None if _note(path)["fingerprint"] == fingerprint else "belongs to another spec or other inputs; removed"


def _refuse_other_number(folder: Path, step: int, parts: int) -> None:
    for path in folder.glob(f"step-{step:08d}.*safetensors"):
        there = int(found[1]) if (found := re.search(r"-of-(\d+)\.", path.name)) else 1
        if there != parts:
            raise UserError(
                f"{folder}: the state after step {step} is of {there} processes, this training has {parts}: parts are not cut anew. "
                f"Go on with what the study said then (`processes: {there}`), or remove the folder to begin anew"
            )


def _note(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _make_room(folder: Path, size: int) -> None:
    for old in _steps(folder)[:-1]:
        if shutil.disk_usage(folder).free < size:
            _forget(folder, old)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"resume state needs {format_bytes(size)}, {format_bytes(free)} are free in {folder.resolve()}: free some and run again; the last saved step is kept"
        )


def _hash_of(state: Path) -> Path:
    return state.with_suffix(".sha256")


def _forget(folder: Path, step: int) -> None:
    """Remove a state: what makes it count first, its hashes last."""
    for end in ("safetensors", "sha256"):
        for path in folder.glob(f"step-{step:08d}.*{end}"):
            path.unlink()


def _steps(folder: Path) -> list[int]:
    """Steps after which a state, or a part of one, is there."""
    names = (re.fullmatch(r"step-(\d{8})\.(\d+-of-\d+\.)?safetensors", path.name) for path in folder.glob("step-*"))
    return sorted({int(name[1]) for name in names if name})


@torch.no_grad()
def _load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Copy a state into model and optimizer, tensor by tensor. Returns its notes."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            mine = local_shard(parameter)
            mine.copy_(file.get_tensor(f"model.{name}"))
            if f"exp_avg.{name}" in names:
                moments = {key: file.get_tensor(f"{key}.{name}").to(mine.device) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": int(file.get_tensor(f"step.{name}")), **moments}
        torch.set_rng_state(file.get_tensor("rng"))
        if "rng_cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))
        return json.loads(file.metadata()["notes"])
