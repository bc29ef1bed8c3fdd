"""safetensors without torch: headers, memory-mapped tensors, and the layout of a file that is written in place."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfusion.errors import DamagedError

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
OVERFLOW = {"F32": float("inf"), "BF16": (2 - 2.0**-8) * 2.0**127, "F16": 65520.0}  # the least that rounds to infinity
HEADER_LIMIT = 100 * 2**20
SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, dtype name, shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data. Raises :class:`DamagedError`."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{file}: is not there, though the index names it") from None
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise DamagedError(f"{file}: no safetensors header ({size} bytes)")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise DamagedError(f"{file}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise DamagedError(f"{file}: the header is no JSON object")
    return header, 8 + length


def read_checkpoint_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder by name, in the order of files and offsets."""
    return read_headers(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint: one, or those its index names (others may hold it a second time), or all."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return sorted(folder.glob("*.safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{index}: expected a weight_map of tensors and files") from None
    return sorted(folder / str(name) for name in named)


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """All tensors of some safetensors files by name. Raises :class:`DamagedError` naming file and tensor where a header cannot be right."""
    out: dict[str, TensorInfo] = {}
    for file in files:
        for name, entry in _entries(file):
            if name in out:
                raise DamagedError(
                    f"{file}: tensor {name} is also in {out[name].file.name}: which one counts is not told"
                )
            out[name] = entry
    return out


def _entries(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors of one file in the order of their bytes, which leave no gap and no rest."""
    header, at = read_header(file)
    base, size = at, file.stat().st_size
    tensors = [(name, _entry(file, name, info, base)) for name, info in header.items() if name != "__metadata__"]
    for name, entry in sorted(tensors, key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.end > size:
            raise DamagedError(f"{file}: tensor {name} ends at byte {entry.end}, the file at {size}: truncated")
        if entry.start != at:
            raise DamagedError(
                f"{file}: tensor {name} begins at byte {entry.start}, expected {at}: the header is damaged"
            )
        at = entry.end
        yield name, entry
    if at != size:
        raise DamagedError(f"{file}: has {size} bytes, its tensors end at {at}: the header is damaged")


def _entry(file: Path, name: str, info: Any, base: int) -> TensorInfo:
    try:
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
        start, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{file}: tensor {name}: the header tells no dtype, shape and offsets: {info!r}") from None
    expected = SIZES.get(dtype, 0) * math.prod(shape)
    if start > end or min([start, *shape]) < 0 or (dtype in SIZES and end - start != expected):
        raise DamagedError(
            f"{file}: tensor {name}: {dtype} {list(shape)} takes {expected} bytes, the header gives it {start} to {end}"
        )
    return TensorInfo(file, dtype, shape, base + start, base + end)


def tensor_bytes(entry: TensorInfo) -> NDArray[np.uint8]:
    """A tensor's bytes, memory-mapped, read-only."""
    return (
        np.memmap(entry.file, np.uint8, "r", entry.start, (entry.end - entry.start,))
        if entry.end > entry.start
        else np.zeros(0, np.uint8)
    )


def tensor_values(entry: TensorInfo) -> NDArray[Any]:
    """A floating-point tensor, flat and memory-mapped as it is stored; bfloat16 as its bits in uint16."""
    return np.asarray(tensor_bytes(entry)).view(
        FLOATS[entry.dtype]
    )  # a plain array: slicing a memmap costs microseconds


@dataclass(frozen=True)
class FileLayout:
    """How a file will look: the bytes before the first tensor, where each tensor lies, and the size of the whole."""

    head: bytes
    entries: dict[str, TensorInfo]
    size: int


def layout_of(
    file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, Any] | None
) -> FileLayout:
    """Layout of a safetensors file with these tensors (dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    offsets = {name: header[name]["data_offsets"] for name in tensors}
    entries = {
        name: TensorInfo(file, dtype, shape, len(head) + offsets[name][0], len(head) + offsets[name][1])
        for name, (dtype, shape) in tensors.items()
    }
    return FileLayout(head, entries, len(head) + at)
