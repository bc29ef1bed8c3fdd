"""The teacher cache as a training reads it: a teacher's rows at the label positions of a mix.

The files are described in :mod:`llmfusion.teachers.cache_format`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.data.samples import Sample
from llmfusion.errors import DamagedError, UserError
from llmfusion.io.safetensors import FLOATS, TensorInfo, read_headers
from llmfusion.teachers.cache_format import (
    CHUNK_SAMPLES,
    HEAD_FILE,
    INDEX_FILE,
    ExpectedTensors,
    chunk_file_name,
    expected_tensors,
    read_index,
    require_finite,
    require_tensors,
)

IN_MEMORY_BYTES = 64 * 2**20  # a cache of this size is kept in memory, where its rows are read ten times faster
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
RowTensors = dict[str, Tensor]  # tensors by name; the first dimension counts rows


class HiddenStateSource(Protocol):
    """What computes final hidden states anew (:class:`llmfusion.teachers.online.OnlineHiddenStates`)."""

    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Final hidden states at the label positions of each sample, (n, d)."""
        ...


class TeacherCache:
    """Random access to a verified cache by sample id. Of a large cache only what is asked for is ever in memory.

    Tensors, shapes and dtypes must be those of the format and all values finite: :class:`DamagedError` names the file.
    ``source`` computes the states that a cache of kind ``online`` does not hold.
    """

    def __init__(self, artifact: Artifact, source: HiddenStateSource | None = None):
        self.artifact = artifact
        self.facts = artifact.facts
        self.source = source
        self.kind = self.facts["kind"]
        if self.kind not in CHUNK_SAMPLES:
            kinds = ", ".join(CHUNK_SAMPLES)
            raise DamagedError(
                f"{artifact.folder}: the manifest names a cache of kind {self.kind!r}; there are: {kinds}"
            )
        if self.kind == "online" and source is None:
            raise UserError(
                f"{artifact.folder}: holds no states (kind online): "
                "a training needs the teacher itself among its inputs"
            )
        self.index = read_index(artifact.file(INDEX_FILE), self.facts["samples"])
        self._chunk_rows: dict[int, int] = {}  # number of rows of each chunk
        for row in self.index.values():
            end = row["start"] + row["length"]
            self._chunk_rows[row["piece"]] = max(self._chunk_rows.get(row["piece"], 0), end)
        self.in_memory = sum(self._chunk_path(number).stat().st_size for number in self._chunk_rows) <= IN_MEMORY_BYTES
        self._chunks: dict[int, RowTensors] = {}  # whole chunks of a cache that is kept in memory
        self._chunk_headers: dict[int, dict[str, TensorInfo]] = {}
        self._checked_samples: set[str] = set()

    def entry(self, sample: str) -> dict[str, Any]:
        """The index's row of a sample id. Raises :class:`UserError` for a sample that is not in the cache."""
        if sample not in self.index:
            raise UserError(
                f"{self.artifact.folder}: has no rows for sample {sample}; it was too long for the teacher's chat "
                "template. Name the teacher under the mix's tokenizers, so that the mix keeps only what fits every "
                "model"
            )
        return self.index[sample]

    def batch(self, samples: Sequence[Sample]) -> list[RowTensors]:
        """All tensors of these samples' rows, in order, states computed where they are not stored."""
        batch = [self.rows(sample["id"]) for sample in samples]
        if self.source is not None and self.kind == "online":
            for sample, rows, states in zip(samples, batch, self.source(samples), strict=True):
                if len(states) != len(rows["label_id"]):
                    raise UserError(
                        f"{self.artifact.folder}: sample {sample['id']}: {len(rows['label_id'])} rows, "
                        f"now {len(states)}; capture it again"
                    )
                rows["hidden"] = states
        return batch

    def rows(self, sample: str) -> RowTensors:
        """All stored tensors of a sample's rows. Raises :class:`UserError` for a sample that is not in the cache."""
        entry = self.entry(sample)
        number = entry["piece"]
        start = entry["start"]
        length = entry["length"]
        if self.in_memory:
            if number not in self._chunks:
                self._chunks[number] = self._read_rows(number, 0, self._chunk_rows[number])
            rows = {name: tensor[start : start + length] for name, tensor in self._chunks[number].items()}
        else:
            rows = self._read_rows(number, start, length)
        if sample not in self._checked_samples:  # the file was verified: once is enough
            require_finite(self._chunk_path(number), rows, f" in the rows of sample {sample}")
            self._checked_samples.add(sample)
        return rows

    def prefetch(self, samples: Sequence[str]) -> None:
        """Ask the system to read these samples' rows into its page cache in the background; returns at once."""
        for sample in samples if not self.in_memory else ():
            entry = self.entry(sample)
            with _opened(self._chunk_path(entry["piece"])) as handle:
                for tensor in self._chunk_header(entry["piece"]).values():
                    offset, size = _byte_range(tensor, entry["start"], entry["length"])
                    os.posix_fadvise(handle, offset, size, os.POSIX_FADV_WILLNEED)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The teacher's head, ``(weight (V, d), bias (V,) or None)``, in its own dtype."""
        tensors = self._read_head("weight", "bias")
        return tensors["weight"], tensors.get("bias")

    def embedding(self) -> Tensor:
        """The teacher's token embeddings (rows, d): its head where they are tied."""
        name = "embedding" if "embedding" in self._head_header() else "weight"
        return self._read_head(name)[name]

    def _read_head(self, *names: str) -> dict[str, Tensor]:
        """Those of the named tensors of the head's file that are there."""
        path = self.artifact.file(HEAD_FILE)
        stored = self._head_header()
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names if name in stored}
        require_finite(path, tensors)
        return tensors

    def _head_header(self) -> dict[str, TensorInfo]:
        """Header of the head's file: ``weight (V, d)``, ``bias (V,)``, ``embedding (rows, d)``.

        Weight and embedding must have a row for every known token.
        """
        path = self.artifact.file(HEAD_FILE)
        stored = read_headers([path])
        known = self.facts["rows_of_head"]
        for name in ("weight", "embedding") if "embedding" in stored else ("weight",):
            shape = stored[name].shape if name in stored else ()
            if len(shape) != 2 or shape[0] < known:
                raise DamagedError(
                    f"{path}: tensor {name}: expected {known} rows of numbers or more, found {list(shape)}"
                )
        rows, hidden_size = stored["weight"].shape
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, hidden_size), "bias": (rows,)}
        if "embedding" in stored:
            shapes["embedding"] = (stored["embedding"].shape[0], hidden_size)
        expected: ExpectedTensors = {name: (shapes[name], tuple(FLOATS)) for name in stored if name in shapes}
        require_tensors(path, stored, expected)
        return stored

    def _chunk_path(self, number: int) -> Path:
        return self.artifact.file(chunk_file_name(number))

    def _chunk_header(self, number: int) -> dict[str, TensorInfo]:
        """Where the tensors of a chunk lie in its file."""
        if number not in self._chunk_headers:
            path = self._chunk_path(number)
            stored = read_headers([path])
            hidden_size = self._head_header()["weight"].shape[1] if self.kind == "hidden" else 0
            k = self.facts["k"] if self.kind == "topk" else 0
            require_tensors(path, stored, expected_tensors(self.kind, self._chunk_rows[number], hidden_size, k))
            self._chunk_headers[number] = stored
        return self._chunk_headers[number]

    def _read_rows(self, number: int, start: int, length: int) -> RowTensors:
        """Some rows of a chunk."""
        tensors = self._chunk_header(number)
        with _opened(self._chunk_path(number)) as handle:
            return {name: _read_tensor_rows(handle, tensor, start, length) for name, tensor in tensors.items()}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file descriptor to read from."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _byte_range(tensor: TensorInfo, start: int, length: int) -> tuple[int, int]:
    """Offset and size in bytes of some rows."""
    row_bytes = (tensor.end - tensor.start) // tensor.shape[0]
    return tensor.start + start * row_bytes, length * row_bytes


def _read_tensor_rows(handle: int, tensor: TensorInfo, start: int, length: int) -> Tensor:
    """Some rows of a tensor, in memory of their own.

    The file is read, not mapped: pages of a mapping count as this process's memory, and an error of the disk would
    kill it.
    """
    offset, size = _byte_range(tensor, start, length)
    content = bytearray(size)
    done = 0
    while done < size:
        count = os.preadv(handle, [memoryview(content)[done:]], offset + done)
        if count == 0:
            raise DamagedError(f"{tensor.file}: ends before byte {offset + size}: it was cut while it was in use")
        done += count
    return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(length, *tensor.shape[1:])
