"""Resume state of a training: all the next step depends on, in safetensors (no pickles), whole or not there at all.

One file of a :class:`~llmfusion.artifacts.resume.ResumeFolder`, written by the first process; of a sharded model one
file (a part) of each process with its shards. A state counts when all its parts do, and all processes take the same
one. Its header, which is hashed with the weights, holds its name, the key of its training and the sha256 of the state
before it: a state under another step's name, of another training, or that does not follow the one before is not taken.
"""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.errors import UserError
from llmfusion.io.files import format_bytes
from llmfusion.io.safetensors import layout_of
from llmfusion.training.distributed import any_across_ranks, barrier, rank, world_size
from llmfusion.training.sharding import is_sharded, local_shard

logger = logging.getLogger(__name__)
KEPT = 2  # the last one, and the one before in case the last is damaged
MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def checkpoint_bytes(parameters: int, dtype: str) -> int:
    """Bytes of a saved model."""
    return BYTES[dtype] * parameters


def first_state_bytes(parameters: int, folder: Path) -> int:
    """Bytes that a first resume state needs beyond what is in ``folder``; without one a training cannot be stopped."""
    return max(_state_bytes(parameters) - _bytes_in(folder), 0)


def warn_of_few_states(parameters: int, folder: Path) -> None:
    """Log where the disk cannot hold all states that are kept and the one that is being written."""
    needed = (KEPT + 1) * _state_bytes(parameters)
    free = shutil.disk_usage(folder.parent).free
    if free + _bytes_in(folder) < needed:
        logger.info(
            "resume states take up to %s, %s are free in %s: fewer will be kept",
            format_bytes(needed),
            format_bytes(free),
            folder.parent.resolve(),
        )


def _state_bytes(parameters: int) -> int:
    return 3 * BYTES["float32"] * parameters  # weights and two moments


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


def save(
    folder: ResumeFolder, step: int, model: Any, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> Path | None:
    """Write the state after ``step`` steps: weights, moments, random state, and ``progress`` (what JSON holds).

    All processes call. Returns what this process wrote. Raises :class:`UserError` where it does not fit, with the
    last state still there.
    """
    parts = _parts(model)
    if parts == 1 and rank() != 0:
        return None
    tensors = _state_tensors(model, optimizer)
    if rank() == 0:
        _make_room(folder, parts * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    _wait_for_other_parts(parts)
    name = _file_name(step, parts)
    previous = _sha256_of_last(folder, step, parts)
    metadata = {"name": name, "key": folder.key, "previous": previous, "progress": json.dumps(progress)}
    folder.put(name, lambda path: write_tensors(tensors, path, metadata), {})
    _wait_for_other_parts(parts)
    if rank() == 0:
        for old in _steps(folder)[:-KEPT]:
            _remove(folder, old)
    return folder.folder / name


def restore(folder: ResumeFolder, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
    """Load the newest state of this very training that is sound in all processes. Returns its step and progress.

    All processes call. States of another spec or other inputs (another key than the folder's) are removed, and what
    killed writers left half-written; None where there is no usable state. Raises :class:`UserError` for parts of
    another number of processes, which are left.
    """
    parts = _parts(model)
    barrier()  # a writer that shares the folder has ended
    steps = _steps(folder)
    barrier()  # all have listed the same before the first one removes any
    if rank() == 0:
        folder.remove_temporary()  # each can be as large as a state
    for step in reversed(steps):
        _require_number_of_parts(folder, step, parts)
        name = _file_name(step, parts)
        problem = _problem(folder, name, _sha256_of_last(folder, step, parts), model)
        if problem and (parts > 1 or rank() == 0):
            logger.info("%s %s", folder.folder / name, problem)
        [is_unusable] = any_across_ranks(problem is not None)
        if not is_unusable:
            return step, _load(folder.folder / name, model, optimizer)
        if rank() == 0:
            _remove(folder, step)
    return None


def _parts(model: Any) -> int:
    return world_size() if is_sharded(model) else 1


def _wait_for_other_parts(parts: int) -> None:
    if parts > 1:
        barrier()


def _file_name(step: int, parts: int) -> str:
    """``step-00000003.safetensors``, or the second of four parts: ``step-00000003.2-of-4.safetensors``."""
    part = f"{rank() + 1}-of-{parts}." if parts > 1 else ""
    return f"step-{step:08d}.{part}safetensors"


def _steps(folder: ResumeFolder) -> list[int]:
    """Steps after which a state, a part of one, or the note of one is there."""
    return sorted({step for step, _ in _states(folder)})


def _files(folder: ResumeFolder, step: int) -> list[str]:
    return [name for other, name in _states(folder) if other == step]


def _states(folder: ResumeFolder) -> list[tuple[int, str]]:
    """Step and name of every state, or part of one, that is there or of which there is a note."""
    names = [path.name for path in folder.folder.glob("step-*")]
    matches = [re.fullmatch(r"(step-(\d{8})\.(?:\d+-of-\d+\.)?)(?:safetensors|json)", name) for name in names]
    return sorted({(int(match[2]), f"{match[1]}safetensors") for match in matches if match})


def _remove(folder: ResumeFolder, step: int) -> None:
    for name in _files(folder, step):
        folder.remove(name)


def _make_room(folder: ResumeFolder, size: int) -> None:
    """Remove states but the last while there is too little room. Raises :class:`UserError` where that is not enough."""
    for old in _steps(folder)[:-1]:
        if shutil.disk_usage(folder.folder).free < size:
            _remove(folder, old)
    free = shutil.disk_usage(folder.folder).free
    if free < size:
        raise UserError(
            f"resume state needs {format_bytes(size)}, {format_bytes(free)} are free in {folder.folder.resolve()}: "
            "free some and run again; the last saved step is kept"
        )


def _require_number_of_parts(folder: ResumeFolder, step: int, parts: int) -> None:
    for name in _files(folder, step):
        match = re.search(r"-of-(\d+)\.", name)
        number = int(match[1]) if match else 1
        if number != parts:
            raise UserError(
                f"{folder.folder}: the state after step {step} is of {number} processes, this training has {parts}: "
                f"parts are not cut anew. Go on with what the study said then (`processes: {number}`), "
                "or remove the folder to begin anew"
            )


def _sha256_of_last(folder: ResumeFolder, step: int, parts: int) -> str:
    """sha256 of the last state before ``step``, as it was noted; empty where there is none."""
    before = [other for other in _steps(folder) if other < step]
    name = _file_name(before[-1], parts) if before else ""
    return str(folder.note(name).get("sha256", "")) if before and folder.is_ours(name) else ""


def _problem(folder: ResumeFolder, name: str, last: str, model: Any) -> str | None:
    """Why a training cannot go on from a state, in words; None where it can. ``last``: sha256 of the one before it."""
    if folder.note(name) and not folder.is_ours(name):
        return "belongs to another spec or other inputs; removed"
    if not folder.is_whole(name):
        return "is damaged or was not finished; taking the one before"
    header = _header(folder.folder / name)
    if header.get("name") != name:
        return f"is the state {header.get('name')} under another name; taking the one before"
    if header.get("key") != folder.key or not _fits(folder.folder / name, model):
        return "is the state of another training; taking the one before"
    if last and header.get("previous") not in ("", last):
        return "does not follow the state before it; taking that one"
    return None


def _header(path: Path) -> dict[str, Any]:
    """The header of a state, its progress as data; empty where it is not one that a training wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
        progress = json.loads(header["progress"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return {}
    return {**header, "progress": progress} if isinstance(progress, dict) else {}


def _fits(path: Path, model: Any) -> bool:
    """Whether a state holds each parameter of the model in its shape."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        return "rng" in names and all(
            f"model.{name}" in names
            and file.get_slice(f"model.{name}").get_shape() == list(local_shard(parameter).shape)
            for name, parameter in model.named_parameters()
        )


def _state_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = local_shard(parameter.detach())
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = state[moment]
        tensors[f"step.{name}"] = torch.tensor(state["step"])
    return tensors


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    """Write a safetensors file. Returns its sha256.

    One tensor after the other: a copy of all would take as much host memory as a node's GPUs hold.
    """
    # the widest first, so that each begins at a multiple of its width
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    shapes = {name: (DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}
    layout = layout_of(path, shapes, metadata)
    hashed = hashlib.sha256(layout.head)
    with open(path, "wb") as file:
        file.write(layout.head)
        for name in names:
            content = tensors[name].contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            file.write(content)
            hashed.update(content)
    return hashed.hexdigest()


@torch.no_grad()
def _load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a state into model and optimizer, tensor by tensor. Returns its progress."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            shard = local_shard(parameter)
            shard.copy_(file.get_tensor(f"model.{name}"))
            if f"exp_avg.{name}" in names:
                moments = {moment: file.get_tensor(f"{moment}.{name}").to(shard.device) for moment in MOMENTS}
                optimizer.state[parameter] = {"step": int(file.get_tensor(f"step.{name}")), **moments}
        torch.set_rng_state(file.get_tensor("rng"))
        if "rng_cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))
    return _header(path)["progress"]
