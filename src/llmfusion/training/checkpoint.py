"""Resume state: everything the next step depends on, in safetensors (no pickles), whole or not there at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmfusion.artifacts import sha256_file, sync, write_file
from llmfusion.errors import UserError
from llmfusion.step import Job, amount

KEPT = 2  # the last one, and the one before in case the last is damaged
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def need(job: Job, parameters: int, dtype: str) -> None:
    """Refuse a training whose checkpoint cannot be written, or that could not be stopped: no room for even one resume state."""
    one = 3 * WIDTH["float32"] * parameters
    there = sum(path.stat().st_size for path in (job.work / "state").glob("*"))
    job.need(f"a model of {parameters:,} parameters ({dtype})", WIDTH[dtype] * parameters)
    job.need(f"resume state for {parameters:,} parameters", 0, max(one - there, 0))
    free = shutil.disk_usage(job.work).free
    if free + there < (KEPT + 1) * one:
        print(f"resume states take up to {amount((KEPT + 1) * one)}, {amount(free)} are free in {job.work.resolve()}: fewer will be kept", flush=True)


def save(folder: Path, step: int, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer, records: list[dict[str, Any]]) -> Path:
    """Write the state after ``step`` optimizer steps: weights, moments, RNG, and the metrics so far.

    Raises :class:`UserError` where it does not fit, with the last state still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    names = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{names[id(parameter)]}"] = state[key]
        tensors[f"step.{names[id(parameter)]}"] = torch.tensor(state["step"])
    note = {"step": str(step), "fingerprint": fingerprint, "records": json.dumps(records)}
    _make_room(folder, sum(t.numel() * t.element_size() for t in tensors.values()))
    path, temporary = folder / f"step-{step:08d}.safetensors", folder / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, metadata=note)
        sync(temporary)
        hashed = sha256_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half of a state on a full disk would keep it full
    write_file(_hash_of(path), hashed.encode())  # last: a state without its hash is not trusted
    for old in _states(folder)[:-KEPT]:
        _forget(old)
    return path


def restore(folder: Path, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]] | None:
    """Load the newest readable state of this very training into model and optimizer. Returns its step and metrics.

    States of another spec or other inputs (``fingerprint``) are removed, and what killed writers left half-done; without
    a usable one the answer is None.
    """
    for left in folder.glob(".*.tmp"):  # each can be as large as a state
        left.unlink()
    for path in reversed(_states(folder)):
        if not _hash_of(path).exists() or sha256_file(path).encode() != _hash_of(path).read_bytes():
            print(f"{path} is damaged or was not finished; taking the one before")
            _forget(path)
            continue
        with safe_open(path, framework="pt") as file:
            note = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if note["fingerprint"] != fingerprint:
            print(f"{path} belongs to another spec or other inputs; removed")
            _forget(path)
            continue
        _load(tensors, model, optimizer)
        return int(note["step"]), json.loads(note["records"])
    return None


def _make_room(folder: Path, size: int) -> None:
    for old in _states(folder)[:-1]:
        if shutil.disk_usage(folder).free < size:
            _forget(old)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"resume state needs {amount(size)}, {amount(free)} are free in {folder.resolve()}: free some and run again; the last saved step is kept"
        )


def _hash_of(state: Path) -> Path:
    return state.with_suffix(".sha256")


def _forget(state: Path) -> None:
    state.unlink()
    _hash_of(state).unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d{8}\.safetensors", p.name))


@torch.no_grad()
def _load(tensors: dict[str, Tensor], model: Any, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": int(tensors[f"step.{name}"]), **moments}
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
