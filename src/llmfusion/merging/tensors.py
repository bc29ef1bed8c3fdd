"""safetensors without torch: headers, memory-mapped tensors as float32, and writing a file tensor by tensor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfusion.errors import DamagedError

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
OVERFLOW = {"F32": float("inf"), "BF16": (2 - 2.0**-8) * 2.0**127, "F16": 65520.0}  # the least that rounds to infinity
HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype name, shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data. Raises :class:`DamagedError`."""
    size = file.stat().st_size
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


def entries_of(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder by name, in the order of files and offsets."""
    out: dict[str, Entry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, base = header_of(file)
        tensors = [(name, info) for name, info in header.items() if name != "__metadata__"]
        for name, info in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
            start, end = info["data_offsets"]
            if base + end > file.stat().st_size:
                raise DamagedError(f"{file}: tensor {name} ends at byte {base + end}, the file at {file.stat().st_size}: truncated")
            if name in out:
                raise DamagedError(f"{file}: tensor {name} is also in {out[name].file.name}: which one counts is not told")
            out[name] = Entry(file, info["dtype"], tuple(info["shape"]), base + start, base + end)
    return out


def raw(entry: Entry) -> NDArray[np.uint8]:
    """A tensor's bytes, memory-mapped, read-only."""
    return np.memmap(entry.file, np.uint8, "r", entry.start, (entry.end - entry.start,)) if entry.end > entry.start else np.zeros(0, np.uint8)


def as_float32(entry: Entry) -> NDArray[np.float32]:
    """A floating-point tensor as a flat float32 array (exact for bf16 and fp16)."""
    return widen(raw(entry), entry.dtype)


def widen(content: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The values behind a floating-point tensor's bytes as float32."""
    values = content.view(FLOATS[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> bytes:
    """Bytes of a tensor in a safetensors dtype, rounded to nearest even once."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def write(file: Path, layout: dict[str, tuple[str, tuple[int, ...], int]], tensors: Iterator[tuple[str, bytes]]) -> None:
    """Write a safetensors file: the header from ``layout`` (name: dtype, shape, bytes), then the tensors in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in layout.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, content in tensors:
            if len(content) != layout[name][2]:
                raise ValueError(f"{name}: {len(content)} bytes, expected {layout[name][2]}")
            handle.write(content)
