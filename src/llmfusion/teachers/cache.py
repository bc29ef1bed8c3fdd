"""The teacher cache: what a teacher says at the label rows of a mix. Usually its final states, from which exact distributions are recomputed.

Row i of a sample is the state that *predicts* its i-th label token, the end token included. Files:

- ``piece-NNNNN.safetensors``: rows of :data:`PIECE` consecutive samples of the mix. ``label_logprob``, ``entropy``, ``logsumexp (n,)`` fp32 in
  nats, ``label_id (n,)`` int32, exact and at temperature 1; and by ``kind``
  ``hidden``: ``hidden (n, d)`` bf16 or fp32, 2d + 16 bytes a row in bf16. Statistics are of the rounded states through the saved head.
  ``topk``: ``top_id (n, k)`` int32 and ``top_logprob (n, k)`` fp32, the k most likely tokens from the first; ``tail (n,)`` fp32, the mass of the others.
  ``online``: nothing more, 16 bytes a row: the training runs the teacher again for its states (:mod:`llmfusion.teachers.online`).
- ``index.parquet``: per sample ``id``, ``piece``, ``start``, ``length``, and per response ``segment_starts`` (row within
  the sample) and ``segment_prompts`` (the token before it), so that every row's input token is known, and ``response_sha256``.
- ``head.safetensors``: ``weight (V, d)``, ``bias`` if there is one, ``embedding`` unless it is tied to the head.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from llmfusion.artifacts import Artifact
from llmfusion.data.samples import Sample
from llmfusion.errors import DamagedError, UserError
from llmfusion.merging.tensors import FLOATS, Entry, entries_in
from llmfusion.teachers.alignment import responses

PIECE = {"hidden": 128, "topk": 8192, "online": 8192}  # samples in a piece, part of the format: a file of 0.4 GB for states of an 8B model
HEAD = "head.safetensors"
STATISTICS = ("label_logprob", "entropy", "logsumexp")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
Rows = dict[str, Tensor]  # tensors by name, a row each


def piece_name(number: int) -> str:
    """File name of a piece."""
    return f"piece-{number:05d}.safetensors"


class States(Protocol):
    """Who computes final states anew (:class:`llmfusion.teachers.online.Online`)."""

    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Final states at the label rows of each sample, (n, d)."""
        ...


class Cache:
    """Random access to a verified cache by sample id. Only what is asked for is ever read: memory does not grow with the cache.

    What is read must have the tensors, shapes and numbers of the layout above and be finite: :class:`DamagedError` names the file.
    ``states`` computes the states that a cache of kind ``online`` does not hold.
    """

    def __init__(self, artifact: Artifact, states: States | None = None):
        self.artifact, self.facts, self.states = artifact, artifact.facts, states
        self.kind = self.facts["kind"]
        if self.kind not in PIECE:
            raise DamagedError(f"{artifact.folder}: the manifest tells of a cache of kind {self.kind!r}; there are: {', '.join(PIECE)}")
        if self.kind == "online" and states is None:
            raise UserError(f"{artifact.folder}: holds no states (kind online): a training needs the teacher itself among its inputs")
        self.index = _index(artifact.file("index.parquet"), self.facts["samples"])
        self._ends: dict[int, int] = {}  # rows of each piece
        for row in self.index.values():
            self._ends[row["piece"]] = max(self._ends.get(row["piece"], 0), row["start"] + row["length"])
        self._pieces: dict[int, dict[str, Entry]] = {}
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
                    raise UserError(f"{self.artifact.folder}: sample {sample['id']}: {len(rows['label_id'])} rows, now {len(states)}; capture it again")
                rows["hidden"] = states
        return found

    def rows(self, sample: str) -> Rows:
        """All stored tensors of a sample's rows. Raises :class:`UserError` for a sample that is not in the cache."""
        entry = self.entry(sample)
        path, tensors = self.artifact.file(piece_name(entry["piece"])), self._piece(entry["piece"])
        handle = os.open(path, os.O_RDONLY)
        try:
            found = {name: _read(handle, tensor, entry["start"], entry["length"]) for name, tensor in tensors.items()}
        finally:
            os.close(handle)
        if sample not in self._finite:  # the file was verified: once is enough
            _require_finite(path, found, f" in the rows of sample {sample}")
            self._finite.add(sample)
        return found

    def prefetch(self, samples: Sequence[str]) -> None:
        """Have the system read these samples' rows into its own memory while others are worked on; nothing waits, nothing else changes."""
        for sample in samples:
            entry = self.entry(sample)
            handle = os.open(self.artifact.file(piece_name(entry["piece"])), os.O_RDONLY)
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
        _require_finite(path, found)
        return found["weight"], found.get("bias")

    def embedding(self) -> Tensor:
        """The teacher's token embeddings (rows, d): its head where they are tied."""
        path = self.artifact.file(HEAD)
        name = "embedding" if "embedding" in self._head() else "weight"
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name)}
        _require_finite(path, found)
        return found[name]

    def _head(self) -> dict[str, Entry]:
        """Header of the head's file: ``weight (V, d)`` and ``embedding (rows, d)`` with a row for every known token, ``bias (V,)``."""
        path, known = self.artifact.file(HEAD), self.facts["rows_of_head"]
        found = entries_in([path])
        for name in ("weight", "embedding") if "embedding" in found else ("weight",):
            shape = found[name].shape if name in found else ()
            if len(shape) != 2 or shape[0] < known:
                raise DamagedError(f"{path}: tensor {name}: expected {known} rows of numbers or more, found {list(shape)}")
        rows, width = found["weight"].shape
        shapes = {"weight": (rows, width), "bias": (rows,), "embedding": (found.get("embedding", found["weight"]).shape[0], width)}
        _require_layout(path, found, {name: (shapes[name], FLOATS) for name in found if name in shapes})
        return found

    def _piece(self, number: int) -> dict[str, Entry]:
        """Where the tensors of a piece lie in its file."""
        if number not in self._pieces:
            path, rows = self.artifact.file(piece_name(number)), self._ends[number]
            found = entries_in([path])
            _require_layout(path, found, self._layout(rows))
            self._pieces[number] = found
        return self._pieces[number]

    def _layout(self, rows: int) -> dict[str, tuple[Any, Any]]:
        """Shape and allowed dtypes of every tensor of a piece with so many rows."""
        layout: dict[str, tuple[Any, Any]] = {}
        if self.kind == "hidden":
            layout["hidden"] = ((rows, self._head()["weight"].shape[1]), FLOATS)
        if self.kind == "topk":
            k = self.facts["k"]
            layout = {"top_id": ((rows, k), ("I32",)), "top_logprob": ((rows, k), ("F32",)), "tail": ((rows,), ("F32",))}
        return layout | {"label_id": ((rows,), ("I32",)), **dict.fromkeys(STATISTICS, ((rows,), ("F32",)))}


def _span(tensor: Entry, start: int, length: int) -> tuple[int, int]:
    """Offset and size in bytes of some rows."""
    size = (tensor.end - tensor.start) // tensor.shape[0]
    return tensor.start + start * size, length * size


def _read(handle: int, tensor: Entry, start: int, length: int) -> Tensor:
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


def response_sha256(sample: Sample) -> str:
    """What a cache remembers of the text its rows predict."""
    return hashlib.sha256("\n".join(responses(sample)).encode()).hexdigest()


def _count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_count, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


INDEX = {
    "id": _text, "piece": _count, "start": _count, "length": _count, "segment_starts": _counts, "segment_prompts": _counts, "response_sha256": _text,
}  # fmt: skip


def _index(path: Path, samples: int) -> dict[str, dict[str, Any]]:
    """The index by sample id. Raises :class:`DamagedError`."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows):
        if wrong := [key for key, sound in INDEX.items() if not sound(row.get(key))]:
            raise DamagedError(f"{path}, row {number}: {wrong[0]}: found {row.get(wrong[0])!r:.60}; expected {', '.join(INDEX)}")
    index = {row["id"]: row for row in rows}
    if not len(index) == len(rows) == samples:
        raise DamagedError(f"{path}: expected {samples} samples as the manifest tells, found {len(index)} in {len(rows)} rows")
    return index


def _require_layout(path: Path, found: dict[str, Entry], expected: dict[str, tuple[Any, Any]]) -> None:
    """Raise :class:`DamagedError` unless the file holds exactly these tensors, each of its shape and one of its dtypes."""
    for name, (shape, dtypes) in expected.items():
        told = f"{found[name].dtype} {list(found[name].shape)}" if name in found else "none"
        if name not in found or found[name].shape != shape or found[name].dtype not in dtypes:
            raise DamagedError(f"{path}: tensor {name}: expected {' or '.join(dtypes)} {list(shape)}, found {told}")
    if more := sorted(set(found) - set(expected)):
        raise DamagedError(f"{path}: tensor {more[0]}: not part of a teacher cache")


def _require_finite(path: Path, tensors: dict[str, Tensor], where: str = "") -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedError(f"{path}: tensor {name} is not finite{where}: it holds a NaN or an infinity")


def statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, known: int, chunk: int = 512, top: int = 0) -> dict[str, Tensor]:
    """Label log-prob, entropy and logsumexp (N,) fp32, of ``hidden (N, d)`` through a head ``(V, d)``, first ``known`` rows only.

    With ``top`` also that many most likely tokens: ``top_id (N, top)`` int32, ``top_logprob (N, top)``, and the mass of the others, ``tail (N,)``.
    """
    out: dict[str, list[Tensor]] = {name: [] for name in (*STATISTICS, *(("top_id", "top_logprob", "tail") if top else ()))}
    weight, bias = weight[:known].float(), None if bias is None else bias[:known].float()
    for start in range(0, len(hidden), chunk):
        logits = torch.nn.functional.linear(hidden[start : start + chunk].float(), weight, bias)  # (c, V)
        total = logits.logsumexp(-1)
        log_q = logits - total[:, None]
        out["label_logprob"].append(log_q.gather(1, labels[start : start + chunk, None].long())[:, 0])
        q = log_q.exp()
        out["entropy"].append(-(q * log_q).sum(-1))
        out["logsumexp"].append(total)
        if top:
            values, ids = log_q.topk(top)
            for name, found in {"top_id": ids.int(), "top_logprob": values, "tail": q.scatter(1, ids, 0.0).sum(-1)}.items():
                out[name].append(found)
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in out.items()}
