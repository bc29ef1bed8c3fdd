"""Files of a teacher cache: their names, what lies in them, and the checks that it does.

Row i of a sample is the state that *predicts* its i-th label token, the end token included. Files:

- ``piece-NNNNN.safetensors``: rows of :data:`CHUNK_SAMPLES` consecutive samples of the mix. ``label_logprob``, ``entropy``, ``logsumexp (n,)`` fp32 in
  nats, ``label_id (n,)`` int32, exact and at temperature 1; and by ``kind``
  ``hidden``: ``hidden (n, d)`` bf16 or fp32, 2d + 16 bytes a row in bf16. Statistics are of the rounded states through the saved head.
  ``topk``: ``top_id (n, k)`` int32 and ``top_logprob (n, k)`` fp32, the k most likely tokens from the first; ``tail (n,)`` fp32, the mass of the others.
  ``online``: nothing more, 16 bytes a row: the training runs the teacher again for its states (:mod:`llmfusion.teachers.online`).
- ``index.parquet``: per sample ``id``, ``piece``, ``start``, ``length``, and per response ``segment_starts`` (row within
  the sample) and ``segment_prompts`` (the token before it), so that every row's input token is known, and ``response_sha256``.
- ``head.safetensors``: ``weight (V, d)``, ``bias`` if there is one, ``embedding`` unless it is tied to the head.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfusion.data.samples import Sample
from llmfusion.errors import DamagedError
from llmfusion.io.safetensors import FLOATS, TensorInfo
from llmfusion.teachers.alignment import responses
from llmfusion.teachers.statistics import STATISTICS

CHUNK_SAMPLES = {
    "hidden": 128,
    "topk": 8192,
    "online": 8192,
}  # samples in a piece, part of the format: a file of 0.4 GB for states of an 8B model
HEAD = "head.safetensors"


def chunk_file_name(number: int) -> str:
    """File name of a piece."""
    return f"piece-{number:05d}.safetensors"


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


def read_index(path: Path, samples: int) -> dict[str, dict[str, Any]]:
    """The index by sample id. Raises :class:`DamagedError`."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read(use_threads=False).to_pylist()  # read_table takes 40 MB more
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows):
        if wrong := [key for key, sound in INDEX.items() if not sound(row.get(key))]:
            raise DamagedError(
                f"{path}, row {number}: {wrong[0]}: found {row.get(wrong[0])!r:.60}; expected {', '.join(INDEX)}"
            )
    index = {row["id"]: row for row in rows}
    if not len(index) == len(rows) == samples:
        raise DamagedError(
            f"{path}: expected {samples} samples as the manifest tells, found {len(index)} in {len(rows)} rows"
        )
    return index


def layout_of(kind: str, rows: int, width: int, k: int) -> dict[str, tuple[Any, Any]]:
    """Shape and allowed dtypes of every tensor of a piece with so many rows, by name."""
    states = {"hidden": ((rows, width), FLOATS)}
    tokens = {"top_id": ((rows, k), ("I32",)), "top_logprob": ((rows, k), ("F32",)), "tail": ((rows,), ("F32",))}
    own: dict[str, tuple[Any, Any]] = {"hidden": states, "topk": tokens, "online": {}}[kind]  # type: ignore[assignment]
    return own | {"label_id": ((rows,), ("I32",)), **dict.fromkeys(STATISTICS, ((rows,), ("F32",)))}


def require_layout(path: Path, found: dict[str, TensorInfo], expected: dict[str, tuple[Any, Any]]) -> None:
    """Raise :class:`DamagedError` unless the file holds exactly these tensors, each of its shape and one of its dtypes."""
    for name, (shape, dtypes) in expected.items():
        told = f"{found[name].dtype} {list(found[name].shape)}" if name in found else "none"
        if name not in found or found[name].shape != shape or found[name].dtype not in dtypes:
            raise DamagedError(f"{path}: tensor {name}: expected {' or '.join(dtypes)} {list(shape)}, found {told}")
    if more := sorted(set(found) - set(expected)):
        raise DamagedError(f"{path}: tensor {more[0]}: not part of a teacher cache")


def require_finite(path: Path, tensors: dict[str, Tensor], where: str = "") -> None:
    """Raise :class:`DamagedError` naming the tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedError(f"{path}: tensor {name} is not finite{where}: it holds a NaN or an infinity")
