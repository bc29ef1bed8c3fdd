"""Resume state: everything the next step depends on, in safetensors (no pickles), whole or not there at all."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmfusion.artifacts import sha256_file, sync, write_file

KEPT = 2  # the last one, and the one before in case the last is damaged


def save(folder: Path, step: int, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer, records: list[dict[str, Any]]) -> Path:
    """Write the state after ``step`` optimizer steps: weights, moments, RNG, and the metrics so far."""
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
    note = {"step": str(step), "fingerprint": fingerprint, "records": json.dumps(records)}
    path, temporary = folder / f"step-{step:08d}.safetensors", folder / f".step-{step:08d}.{os.getpid()}.tmp"
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, metadata=note)
    sync(temporary)
    hashed = sha256_file(temporary)
    os.replace(temporary, path)
    write_file(_hash_of(path), hashed.encode())  # last: a state without its hash is not trusted
    for old in _states(folder)[:-KEPT]:
        _forget(old)
    return path


def restore(folder: Path, fingerprint: str, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """Load the newest readable state of this very training into model and optimizer. Returns its step and metrics.

    States of another spec or other inputs (``fingerprint``) are removed; without a usable one the answer is ``(0, [])``.
    """
    for path in reversed(_states(folder)):
        if not _hash_of(path).exists() or sha256_file(path) != _hash_of(path).read_text():
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
        _load(tensors, model, optimizer, int(note["step"]))
        return int(note["step"]), json.loads(note["records"])
    return 0, []


def _hash_of(state: Path) -> Path:
    return state.with_suffix(".sha256")


def _forget(state: Path) -> None:
    state.unlink()
    _hash_of(state).unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d{8}\.safetensors", p.name))


@torch.no_grad()
def _load(tensors: dict[str, Tensor], model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
