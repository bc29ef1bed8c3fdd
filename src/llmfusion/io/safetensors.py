"""safetensors without torch: headers, memory-mapped tensors, and the layout of a file that is written in place.

numpy is imported with the first tensor: headers alone are also read where a study is planned.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfusion.errors import DamagedError
from llmfusion.io.files import model_file, parse_json, read_json_object
from llmfusion.io.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOATS = {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}  # numpy's names of dtypes; bfloat16 as its bits
OVERFLOW = {"F32": float("inf"), "BF16": (2 - 2.0**-8) * 2.0**127, "F16": 65520.0}  # the least that rounds to infinity
HEADER_LIMIT = 100 * 2**20
TENSOR_LIMIT = 1_000_000  # in a file; the largest models have a fifth of it in all
MOST_DIMENSIONS = 16
LONGEST_NAME = 1000  # characters of a tensor's name
LARGEST = 2**63  # no dimension and no offset reaches it
INDEX = "model.safetensors.index.json"
SIZES = {  # bytes a value
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, dtype name, shape, first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes in its file."""
        return self.end - self.start


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data.

    Raises :class:`DamagedError`, also for what other readers of the header would refuse: what is merged or linked from
    here is read by them.
    """
    size = model_file(file.parent, file.name).stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise DamagedError(f"{file}: no safetensors header ({size} bytes); fetch the file again")
            text = handle.read(length)
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read: {error.strerror}; give yourself the right to read it") from None
    header = parse_json(text, f"{file}: the header")
    if not isinstance(header, dict):
        raise DamagedError(f"{file}: the header is no JSON object; fetch the file again")
    if len(header) > TENSOR_LIMIT:
        raise DamagedError(f"{file}: the header names {len(header):,} tensors, expected at most {TENSOR_LIMIT:,}")
    metadata = header.get("__metadata__")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise DamagedError(f"{file}: the header's __metadata__ is {str(metadata)[:80]!r}, expected an object of texts")
    for name in header:
        if not (name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            expected = f"expected 1 to {LONGEST_NAME} characters that can be printed"
            raise DamagedError(f"{file}: a tensor has the name {name[:80]!r}, {expected}; fetch the file again")
    return header, 8 + length


def read_checkpoint_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder by name, in the order of files and offsets."""
    return read_headers(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint: one, or those its index names (others may hold it a second time),
    or all.

    Raises :class:`DamagedError` for an index that cannot be used, and for files that
    :func:`llmfusion.io.files.model_file` refuses.
    """
    single = folder / "model.safetensors"
    index = folder / INDEX
    if os.path.lexists(single):
        return [model_file(folder, single.name)]
    if not os.path.lexists(index):
        return sorted(model_file(folder, path.name) for path in folder.glob("*.safetensors"))
    return [model_file(folder, name) for name in _indexed_files(folder)]


def _indexed_files(folder: Path) -> list[str]:
    """The files that a checkpoint's index names, which lie beside it."""
    index = model_file(folder, INDEX)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"{index}: expected a weight_map of tensors and files")
    names = set()
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and len(name) < 256 and Path(name).name == name and name.isprintable()
        if not is_name or not name.endswith(".safetensors"):
            found = f"weight_map gives tensor {tensor[:80]!r} the file {str(name)[:80]!r}"
            raise DamagedError(f"{index}: {found}, expected the name of a .safetensors file beside the index")
        names.add(name)
    return sorted(names)


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """All tensors of some safetensors files by name.

    Raises :class:`DamagedError` naming file and tensor where a header cannot be right.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_infos(file):
            if name in tensors:
                other = tensors[name].file.name
                raise DamagedError(f"{file}: tensor {name} is also in {other}: nothing says which one counts")
            tensors[name] = info
    return tensors


def _read_infos(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors of one file in the order of their bytes, which leave no gap and no rest."""
    header, data_start = read_header(file)
    size = file.stat().st_size
    end = data_start
    infos = [
        (name, _parse_info(file, name, entry, data_start)) for name, entry in header.items() if name != "__metadata__"
    ]
    for name, info in sorted(infos, key=lambda pair: (pair[1].start, pair[1].end)):
        if info.end > size:
            raise DamagedError(f"{file}: tensor {name} ends at byte {info.end}, the file at {size}: truncated")
        if info.start != end:
            raise DamagedError(
                f"{file}: tensor {name} begins at byte {info.start}, expected {end}: the header is damaged"
            )
        end = info.end
        yield name, info
    if end != size:
        raise DamagedError(f"{file}: has {size} bytes, its tensors end at {end}: the header is damaged")


def _parse_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's entry of a header."""
    try:
        dtype = entry["dtype"]
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        is_right = isinstance(dtype, str) and bool(dtype) and len(shape) <= MOST_DIMENSIONS
        is_right = is_right and all(type(n) is int and -LARGEST < n < LARGEST for n in (start, end, *shape))
    except (KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        found = f"the header has no dtype, shape and offsets: {str(entry)[:200]}"
        raise DamagedError(f"{file}: tensor {name[:200]}: {found}; fetch the file again")
    expected = SIZES.get(dtype, 0) * math.prod(shape)
    if start > end or min([start, *shape]) < 0 or (dtype in SIZES and end - start != expected):
        raise DamagedError(
            f"{file}: tensor {name}: {dtype} {list(shape)} takes {expected} bytes, the header gives it {start} to {end}"
        )
    return TensorInfo(file, dtype, shape, data_start + start, data_start + end)


def tensor_bytes(info: TensorInfo) -> "NDArray[np.uint8]":
    """A tensor's bytes, memory-mapped, read-only."""
    if not info.nbytes:
        return np.zeros(0, np.uint8)
    return np.memmap(info.file, np.uint8, "r", info.start, (info.nbytes,))


def tensor_values(info: TensorInfo) -> "NDArray[Any]":
    """A floating-point tensor, flat and memory-mapped as it is stored; bfloat16 as its bits in uint16."""
    plain = np.asarray(tensor_bytes(info))  # slicing a memmap costs microseconds
    return plain.view(FLOATS[info.dtype])


@dataclass(frozen=True)
class FileLayout:
    """How a file will look: the bytes before the first tensor, where each tensor lies, and the size of the whole."""

    head: bytes
    tensors: dict[str, TensorInfo]
    size: int


def layout_of(
    file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, Any] | None
) -> FileLayout:
    """Layout of a safetensors file with these tensors (dtype, shape) in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    infos = {name: _parse_info(file, name, entries[name], len(head)) for name in tensors}
    return FileLayout(head, infos, len(head) + offset)
