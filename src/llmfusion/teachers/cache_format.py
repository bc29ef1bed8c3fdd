"""Files of a teacher cache: their names, the tensors in them, and the checks that they are there.

Row i of a sample is the state that *predicts* its i-th label token, the end token included. A chunk is the rows of
:data:`CHUNK_SAMPLES` consecutive samples of the mix. On disk a chunk is called a piece: in the names of its files, in
the index's column ``piece``, in the folder ``work/.../pieces`` and in a shard's fact ``pieces``. Files:

- ``piece-NNNNN.safetensors``: a chunk. ``label_logprob``, ``entropy``, ``logsumexp (n,)`` fp32 in nats, ``label_id
  (n,)`` int32, exact and at temperature 1; and by ``kind``
  ``hidden``: ``hidden (n, d)`` bf16 or fp32, 2d + 16 bytes a row in bf16. Statistics are of the rounded states through
  the saved head.
  ``topk``: ``top_id (n, k)`` int32 and ``top_logprob (n, k)`` fp32, the k most likely tokens from the first; ``tail
  (n,)`` fp32, the mass of the others.
  ``online``: nothing more, 16 bytes a row: the training runs the teacher again for its states
  (:mod:`llmfusion.teachers.online`).
- ``index.parquet``: per sample ``id``, ``piece``, ``start``, ``length``, and per response ``segment_starts`` (row
  within the sample) and ``segment_prompts`` (the token before it), so that every row's input token is known, and
  ``response_sha256``.
- ``head.safetensors``: ``weight (V, d)``, ``bias`` if there is one, ``embedding`` unless it is tied to the head.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfusion.data.samples import Sample
from llmfusion.errors import DamagedError
from llmfusion.io.safetensors import FLOATS, TensorInfo
from llmfusion.teachers.alignment import responses
from llmfusion.teachers.statistics import STATISTICS

# samples in a chunk, by kind, and part of the format: a file of 0.4 GB for states of an 8B model
CHUNK_SAMPLES = {"hidden": 128, "topk": 8192, "online": 8192}
HEAD_FILE = "head.safetensors"
INDEX_FILE = "index.parquet"
ExpectedTensors = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # shape and allowed dtypes by tensor name


def chunk_file_name(number: int) -> str:
    """File name of a chunk's rows."""
    return f"piece-{number:05d}.safetensors"


def response_sha256(sample: Sample) -> str:
    """Hash of the text that a sample's rows predict, which the index keeps."""
    return hashlib.sha256("\n".join(responses(sample)).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


INDEX_COLUMNS: dict[str, Callable[[Any], bool]] = {
    "id": _is_text,
    "piece": _is_count,
    "start": _is_count,
    "length": _is_count,
    "segment_starts": _are_counts,
    "segment_prompts": _are_counts,
    "response_sha256": _is_text,
}


def read_index(path: Path, samples: int) -> dict[str, dict[str, Any]]:
    """The index by sample id.

    Raises :class:`DamagedError` for a file that is no Parquet, for a row without a column or with a wrong value, and
    where the number of different samples is not ``samples``.
    """
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read(use_threads=False).to_pylist()  # read_table takes 40 MB more
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows):
        if wrong := [column for column, is_sound in INDEX_COLUMNS.items() if not is_sound(row.get(column))]:
            value = f"{row.get(wrong[0])!r:.60}"
            raise DamagedError(f"{path}, row {number}: {wrong[0]}: found {value}; expected {', '.join(INDEX_COLUMNS)}")
    index = {row["id"]: row for row in rows}
    if not len(index) == len(rows) == samples:
        raise DamagedError(
            f"{path}: expected {samples} samples as the manifest tells, found {len(index)} in {len(rows)} rows"
        )
    return index


def expected_tensors(kind: str, rows: int, hidden_size: int, k: int) -> ExpectedTensors:
    """Shape and allowed dtypes of every tensor of a chunk with so many rows, by name."""
    of_kind: dict[str, ExpectedTensors] = {
        "hidden": {"hidden": ((rows, hidden_size), tuple(FLOATS))},
        "topk": {
            "top_id": ((rows, k), ("I32",)),
            "top_logprob": ((rows, k), ("F32",)),
            "tail": ((rows,), ("F32",)),
        },
        "online": {},
    }
    statistics: ExpectedTensors = dict.fromkeys(STATISTICS, ((rows,), ("F32",)))
    return of_kind[kind] | {"label_id": ((rows,), ("I32",))} | statistics


def require_tensors(path: Path, stored: dict[str, TensorInfo], expected: ExpectedTensors) -> None:
    """Raise :class:`DamagedError` unless the file holds exactly these tensors, of their shapes and allowed dtypes."""
    for name, (shape, dtypes) in expected.items():
        tensor = stored.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype not in dtypes:
            actual = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DamagedError(f"{path}: tensor {name}: expected {' or '.join(dtypes)} {list(shape)}, found {actual}")
    if additional := sorted(set(stored) - set(expected)):
        raise DamagedError(f"{path}: tensor {additional[0]}: not part of a teacher cache")


def require_finite(path: Path, tensors: dict[str, Tensor], where: str = "") -> None:
    """Raise :class:`DamagedError` naming the tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedError(f"{path}: tensor {name} is not finite{where}: it holds a NaN or an infinity")
