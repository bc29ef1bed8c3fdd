"""The teacher cache: final hidden states of label rows, from which exact distributions are recomputed.

Row i of a sample is the state that *predicts* its i-th label token, the end token included. Files:

- ``shard-NNNNN.safetensors``: ``hidden (n, d)`` bf16 or fp32, ``label_logprob``, ``entropy``, ``logsumexp (n,)`` fp32 in
  nats, ``label_id (n,)`` int32: 2d + 16 bytes a row in bf16. Statistics are of the rounded states through the saved head.
- ``index.parquet``: per sample ``id``, ``shard``, ``start``, ``length``, and per response ``segment_starts`` (row within
  the sample) and ``segment_prompts`` (the token before it), so that every row's input token is known, and ``response_sha256``.
- ``head.safetensors``: ``weight (V, d)``, ``bias`` if there is one, ``embedding`` unless it is tied to the head.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmfusion.artifacts import Artifact
from llmfusion.data.samples import Sample
from llmfusion.errors import DamagedError, UserError
from llmfusion.merging.tensors import FLOATS, Entry, entries_in
from llmfusion.teachers.alignment import responses

SHARD_ROWS = 65_536  # part of the format: the same rows always lie in the same shards
STATISTICS = ("label_logprob", "entropy", "logsumexp")
TENSORS = ("hidden", "label_id", *STATISTICS)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


class Cache:
    """Random access to a verified cache by sample id; shards are memory-mapped.

    What is read must have the tensors, shapes and numbers of the layout above and be finite: :class:`DamagedError` names the file.
    """

    def __init__(self, artifact: Artifact):
        self.artifact, self.facts = artifact, artifact.facts
        self.index = _index(artifact.file("index.parquet"), self.facts["samples"])
        self._ends: dict[int, int] = {}  # rows of each shard
        for row in self.index.values():
            self._ends[row["shard"]] = max(self._ends.get(row["shard"], 0), row["start"] + row["length"])
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._finite: set[str] = set()

    def entry(self, sample: str) -> dict[str, Any]:
        """The index's row of a sample. Raises :class:`UserError` for a sample that is not in the cache."""
        if sample not in self.index:
            raise UserError(
                f"{self.artifact.folder}: has no rows for sample {sample}; it was too long for the teacher's chat template. "
                "Name the teacher under the mix's tokenizers, so that the mix keeps only what fits every model"
            )
        return self.index[sample]

    def rows(self, sample: str) -> dict[str, Tensor]:
        """All tensors of a sample's rows. Raises :class:`UserError` for a sample that is not in the cache."""
        entry = self.entry(sample)
        shard = self._shard(entry["shard"])
        span = slice(entry["start"], entry["start"] + entry["length"])
        found = {name: shard[name][span] for name in TENSORS}
        if sample not in self._finite:  # a mapped file does not change under a training that holds it: once is enough
            _require_finite(self.artifact.file(shard_name(entry["shard"])), found, f" in the rows of sample {sample}")
            self._finite.add(sample)
        return found

    def head(self) -> tuple[Tensor, Tensor | None]:
        """``(weight (V, d), bias (V,) or None)`` as the teacher has them."""
        path = self.artifact.file("head.safetensors")
        names = ("weight", "bias") if "bias" in self._head() else ("weight",)
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in names}
        _require_finite(path, found)
        return found["weight"], found.get("bias")

    def embedding(self) -> Tensor:
        """The teacher's token embeddings (rows, d): its head where they are tied."""
        path = self.artifact.file("head.safetensors")
        name = "embedding" if "embedding" in self._head() else "weight"
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name)}
        _require_finite(path, found)
        return found[name]

    def _head(self) -> dict[str, Entry]:
        """Header of the head's file: ``weight (V, d)`` and ``embedding (rows, d)`` with a row for every known token, ``bias (V,)``."""
        path, known = self.artifact.file("head.safetensors"), self.facts["rows_of_head"]
        found = entries_in([path])
        for name in ("weight", "embedding") if "embedding" in found else ("weight",):
            shape = found[name].shape if name in found else ()
            if len(shape) != 2 or shape[0] < known:
                raise DamagedError(f"{path}: tensor {name}: expected {known} rows of numbers or more, found {list(shape)}")
        rows, width = found["weight"].shape
        shapes = {"weight": (rows, width), "bias": (rows,), "embedding": (found.get("embedding", found["weight"]).shape[0], width)}
        _require_layout(path, found, {name: (shapes[name], FLOATS) for name in found if name in shapes})
        return found

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = self.artifact.file(shard_name(number))
            rows, width = self._ends[number], self._head()["weight"].shape[1]
            layout: dict[str, tuple[Any, Any]] = {"hidden": ((rows, width), FLOATS), "label_id": ((rows,), ("I32",))}
            _require_layout(path, entries_in([path]), layout | dict.fromkeys(STATISTICS, ((rows,), ("F32",))))
            with safe_open(path, framework="pt") as file:
                self._shards[number] = {name: file.get_tensor(name) for name in TENSORS}  # views of the mapped file, not copies
        return self._shards[number]


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
    "id": _text, "shard": _count, "start": _count, "length": _count, "segment_starts": _counts, "segment_prompts": _counts, "response_sha256": _text,
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


def statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, known: int, chunk: int = 512) -> dict[str, Tensor]:
    """Label log-prob, entropy and logsumexp (N,) fp32, of ``hidden (N, d)`` through a head ``(V, d)``, first ``known`` rows only."""
    out: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    weight, bias = weight[:known].float(), None if bias is None else bias[:known].float()
    for start in range(0, len(hidden), chunk):
        logits = torch.nn.functional.linear(hidden[start : start + chunk].float(), weight, bias)  # (c, V)
        total = logits.logsumexp(-1)
        log_q = logits - total[:, None]
        out["label_logprob"].append(log_q.gather(1, labels[start : start + chunk, None].long())[:, 0])
        out["entropy"].append(-(log_q.exp() * log_q).sum(-1))
        out["logsumexp"].append(total)
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in out.items()}
