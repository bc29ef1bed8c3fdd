"""The teacher cache as a training reads it: what a teacher says at the label rows of a mix. The files are told in :mod:`llmfusion.teachers.cache_format`."""

import os
from collections.abc import Sequence
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
    HEAD,
    chunk_file_name,
    layout_of,
    read_index,
    require_finite,
    require_layout,
)

SMALL = 64 * 2**20  # bytes: a cache of this size is kept in memory, where its rows are found ten times faster
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
Rows = dict[str, Tensor]  # tensors by name, a row each


class HiddenStateSource(Protocol):
    """Who computes final states anew (:class:`llmfusion.teachers.online.Online`)."""

    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Final states at the label rows of each sample, (n, d)."""
        ...


class Cache:
    """Random access to a verified cache by sample id. Of all but a small one only what is asked for is ever in memory.

    What is read must have the tensors, shapes and numbers of the layout and be finite: :class:`DamagedError` names the file.
    ``states`` computes the states that a cache of kind ``online`` does not hold.
    """

    def __init__(self, artifact: Artifact, states: HiddenStateSource | None = None):
        self.artifact, self.facts, self.states = artifact, artifact.facts, states
        self.kind = self.facts["kind"]
        if self.kind not in CHUNK_SAMPLES:
            raise DamagedError(
                f"{artifact.folder}: the manifest tells of a cache of kind {self.kind!r}; there are: {', '.join(CHUNK_SAMPLES)}"
            )
        if self.kind == "online" and states is None:
            raise UserError(
                f"{artifact.folder}: holds no states (kind online): a training needs the teacher itself among its inputs"
            )
        self.index = read_index(artifact.file("index.parquet"), self.facts["samples"])
        self._ends: dict[int, int] = {}  # rows of each piece
        for row in self.index.values():
            self._ends[row["piece"]] = max(self._ends.get(row["piece"], 0), row["start"] + row["length"])
        self.small = sum(artifact.file(chunk_file_name(number)).stat().st_size for number in self._ends) <= SMALL
        self._pieces: dict[int, dict[str, TensorInfo]] = {}
        self._kept: dict[int, Rows] = {}
        self._finite: set[str] = set()

    def entry(self, sample: str) -> dict[str, Any]:
        """The index's row of a sample. Raises :class:`UserError` for a sample that is not in the cache."""
        if sample not in self.index:
            raise UserError(
                f"{self.artifact.folder}: has no rows for sample {sample}; it was too long for the teacher's chat template. "
                "Name the teacher under the mix's tokenizers, so that the mix keeps only what fits every model"
            )
        return self.index[sample]

    def batch(self, samples: Sequence[Sample]) -> list[Rows]:
        """All tensors of these samples' rows, in order, states computed where they are not stored."""
        found = [self.rows(sample["id"]) for sample in samples]
        if self.states is not None and self.kind == "online":
            for sample, rows, states in zip(samples, found, self.states(samples), strict=True):
                if len(states) != len(rows["label_id"]):
                    raise UserError(
                        f"{self.artifact.folder}: sample {sample['id']}: {len(rows['label_id'])} rows, now {len(states)}; capture it again"
                    )
                rows["hidden"] = states
        return found

    def rows(self, sample: str) -> Rows:
        """All stored tensors of a sample's rows. Raises :class:`UserError` for a sample that is not in the cache."""
        entry = self.entry(sample)
        number, start, length = entry["piece"], entry["start"], entry["length"]
        if self.small:
            if number not in self._kept:
                self._kept[number] = self._read(number, 0, self._ends[number])
            found = {name: tensor[start : start + length] for name, tensor in self._kept[number].items()}
        else:
            found = self._read(number, start, length)
        if sample not in self._finite:  # the file was verified: once is enough
            require_finite(self.artifact.file(chunk_file_name(number)), found, f" in the rows of sample {sample}")
            self._finite.add(sample)
        return found

    def _read(self, number: int, start: int, length: int) -> Rows:
        """Some rows of a piece."""
        tensors = self._piece(number)
        handle = os.open(self.artifact.file(chunk_file_name(number)), os.O_RDONLY)
        try:
            return {name: _read(handle, tensor, start, length) for name, tensor in tensors.items()}
        finally:
            os.close(handle)

    def prefetch(self, samples: Sequence[str]) -> None:
        """Have the system read these samples' rows into its own memory while others are worked on; nothing waits, nothing else changes."""
        for sample in samples if not self.small else ():
            entry = self.entry(sample)
            handle = os.open(self.artifact.file(chunk_file_name(entry["piece"])), os.O_RDONLY)
            try:
                for tensor in self._piece(entry["piece"]).values():
                    os.posix_fadvise(handle, *_span(tensor, entry["start"], entry["length"]), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """``(weight (V, d), bias (V,) or None)`` as the teacher has them."""
        path = self.artifact.file(HEAD)
        names = ("weight", "bias") if "bias" in self._head() else ("weight",)
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in names}
        require_finite(path, found)
        return found["weight"], found.get("bias")

    def embedding(self) -> Tensor:
        """The teacher's token embeddings (rows, d): its head where they are tied."""
        path = self.artifact.file(HEAD)
        name = "embedding" if "embedding" in self._head() else "weight"
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name)}
        require_finite(path, found)
        return found[name]

    def _head(self) -> dict[str, TensorInfo]:
        """Header of the head's file: ``weight (V, d)`` and ``embedding (rows, d)`` with a row for every known token, ``bias (V,)``."""
        path, known = self.artifact.file(HEAD), self.facts["rows_of_head"]
        found = read_headers([path])
        for name in ("weight", "embedding") if "embedding" in found else ("weight",):
            shape = found[name].shape if name in found else ()
            if len(shape) != 2 or shape[0] < known:
                raise DamagedError(
                    f"{path}: tensor {name}: expected {known} rows of numbers or more, found {list(shape)}"
                )
        rows, width = found["weight"].shape
        shapes = {
            "weight": (rows, width),
            "bias": (rows,),
            "embedding": (found.get("embedding", found["weight"]).shape[0], width),
        }
        require_layout(path, found, {name: (shapes[name], FLOATS) for name in found if name in shapes})
        return found

    def _piece(self, number: int) -> dict[str, TensorInfo]:
        """Where the tensors of a piece lie in its file."""
        if number not in self._pieces:
            path, rows = self.artifact.file(chunk_file_name(number)), self._ends[number]
            found = read_headers([path])
            width = self._head()["weight"].shape[1] if self.kind == "hidden" else 0
            require_layout(
                path, found, layout_of(self.kind, rows, width, self.facts["k"] if self.kind == "topk" else 0)
            )
            self._pieces[number] = found
        return self._pieces[number]


def _span(tensor: TensorInfo, start: int, length: int) -> tuple[int, int]:
    """Offset and size in bytes of some rows."""
    size = (tensor.end - tensor.start) // tensor.shape[0]
    return tensor.start + start * size, length * size


def _read(handle: int, tensor: TensorInfo, start: int, length: int) -> Tensor:
    """Some rows of a tensor, in memory of their own. No mapping: its pages would count as this process's memory, and a disk's error would kill it."""
    offset, size = _span(tensor, start, length)
    content = bytearray(size)
    at = 0
    while at < size:
        count = os.preadv(handle, [memoryview(content)[at:]], offset + at)
        if count == 0:
            raise DamagedError(f"{tensor.file}: ends before byte {offset + size}: it was cut while it was in use")
        at += count
    return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(length, *tensor.shape[1:])
