"""Merge checkpoints tensor by tensor: checks from headers alone, float32 arithmetic, one cast at the end."""

import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.artifacts import require
from llmfusion.errors import UserError
from llmfusion.merging.methods import METHODS
from llmfusion.merging.tensors import FLOATS, Entry, as_float32, entries_of, from_float32, raw, write

Checkpoint = dict[str, Entry]


def merge(pivot: Path, models: Sequence[Path], method: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Merge ``models`` (fine-tuned from ``pivot``) into the folder ``out``; configs and tokenizer are the pivot's.

    Raises :class:`UserError` with every difference in names and shapes before reading any weights, and for values that
    are not finite. Writes ``merge_report.csv`` (per tensor: values, share changed, norms) and returns facts.
    """
    require(method in METHODS, f"merge method {method!r} is not built in this version; built: {', '.join(METHODS)}")
    base, others = entries_of(pivot), [entries_of(m) for m in models]
    check_alike(pivot, base, models, others)
    report: list[dict[str, Any]] = []
    for file in sorted({e.file for e in base.values()}):
        names = [name for name, entry in base.items() if entry.file == file]
        layout = {n: _out_layout(base[n], [o[n] for o in others]) for n in names}
        write(out / file.name, layout, _merged(names, base, others, method, options, layout, report))
    for path in sorted(pivot.iterdir()):
        if path.suffix != ".safetensors" and path.name not in ("manifest.json", "provenance.json", "metrics.jsonl", "merge_report.csv") and path.is_file():
            shutil.copyfile(path, out / path.name)
    with open(out / "merge_report.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(report[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(report)
    values = sum(row["values"] for row in report)
    return {"tensors": len(report), "parameters": values, "changed": sum(row["changed"] * row["values"] for row in report) / values}


def check_alike(pivot: Path, base: Checkpoint, models: Sequence[Path], others: Sequence[Checkpoint]) -> None:
    """Raise :class:`UserError` naming every tensor that is missing, extra or of another shape, with both folders."""
    require(bool(base), f"{pivot}: has no .safetensors weights")
    wrong = []
    for folder, other in zip(models, others, strict=True):
        wrong += [f"{name} is missing in {folder}" for name in base if name not in other]
        wrong += [f"{name} of {folder} is not in the pivot {pivot}" for name in other if name not in base]
        wrong += [
            f"{name} is {list(other[name].shape)} in {folder} and {list(entry.shape)} in the pivot {pivot}"
            for name, entry in base.items()
            if name in other and other[name].shape != entry.shape
        ]
    if wrong:
        raise UserError(f"these checkpoints cannot be merged; {len(wrong)} differences:\n  " + "\n  ".join(wrong))


def _out_layout(pivot: Entry, parents: Sequence[Entry]) -> tuple[str, tuple[int, ...], int]:
    """The pivot's dtype; where all parents are finer (float32), so is the merge: their deltas would be rounded away else."""
    dtype = parents[0].dtype if pivot.dtype in FLOATS and all(p.dtype == "F32" for p in parents) else pivot.dtype
    size = int(np.prod(pivot.shape, dtype=np.int64)) * FLOATS[dtype].itemsize if dtype in FLOATS else pivot.end - pivot.start
    return dtype, pivot.shape, size


def _merged(
    names: list[str], base: Checkpoint, others: Sequence[Checkpoint], method: str, options: dict[str, Any],
    layout: dict[str, tuple[str, tuple[int, ...], int]], report: list[dict[str, Any]],
) -> Iterator[tuple[str, bytes]]:  # fmt: skip
    for name in names:
        if base[name].dtype not in FLOATS:
            yield name, raw(base[name]).tobytes()  # integers and flags are the pivot's
            continue
        theta = _finite(name, base[name])
        deltas = np.stack([_finite(name, other[name]) - theta for other in others])  # (J, n)
        result, notes = METHODS[method](theta, deltas, options)
        if not np.isfinite(result).all():
            raise UserError(f"tensor {name}: the merge is not finite; nothing was published")
        content = from_float32(result.astype(np.float32, copy=False), layout[name][0])
        report.append(
            {"tensor": name, "values": theta.size, "changed": float(np.mean(result != theta)) if theta.size else 0.0,
             "delta_norms": " ".join(f"{float(np.linalg.norm(d)):.6g}" for d in deltas), "merged_norm": f"{float(np.linalg.norm(result - theta)):.6g}", **notes}
        )  # fmt: skip
        yield name, content


def _finite(name: str, entry: Entry) -> np.ndarray:
    values = as_float32(entry)
    if not np.isfinite(values).all():
        raise UserError(f"{entry.file}: tensor {name} holds a NaN or an infinity")
    return values
