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
from llmfusion.merging.tensors import FLOATS, OVERFLOW, Entry, as_float32, entries_of, from_float32, raw, widen, write

Checkpoint = dict[str, Entry]
NOTES = ("manifest.json", "provenance.json", "metrics.jsonl", "merge_report.csv")  # about the pivot, not the merge
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # the pivot's, unmerged


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
        layout = {n: _out_layout(base[n]) for n in names}
        write(out / file.name, layout, _merged(names, base, others, method, options, layout, report))
    for path in sorted(pivot.iterdir()):
        if path.suffix not in WEIGHTS and path.name not in NOTES and path.is_file():
            shutil.copyfile(path, out / path.name)
    with open(out / "merge_report.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(report[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(report)
    values = sum(row["values"] for row in report)
    return {"tensors": len(report), "parameters": values, "changed": sum(row["changed"] * row["values"] for row in report) / values}


def check_alike(pivot: Path, base: Checkpoint, models: Sequence[Path], others: Sequence[Checkpoint]) -> None:
    """Raise :class:`UserError` naming every tensor that is missing, extra, of another shape or of a dtype that is not merged."""
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
    for folder, checkpoint in zip((pivot, *models), (base, *others), strict=True):
        wrong += [
            f"{name} of {folder} is {entry.dtype}, the pivot's {base[name].dtype}; floating-point tensors must be {', '.join(FLOATS)}"
            for name, entry in checkpoint.items()
            if name in base and (_unknown_float(entry) or (entry.dtype in FLOATS) != (base[name].dtype in FLOATS))
        ]
    if wrong:
        raise UserError(f"these checkpoints cannot be merged; {len(wrong)} differences:\n  " + "\n  ".join(wrong))


def _unknown_float(entry: Entry) -> bool:
    """Whether a tensor is floating-point or complex of a kind that is not merged (F64, F8_E4M3, C64)."""
    return entry.dtype not in FLOATS and entry.dtype[0] in "FC"


def _out_layout(pivot: Entry) -> tuple[str, tuple[int, ...], int]:
    """The pivot's dtype, whatever the parents have: arithmetic is float32, rounded once."""
    return pivot.dtype, pivot.shape, pivot.end - pivot.start


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
        if result.size and not max(result.max(), -result.min()) < OVERFLOW[layout[name][0]]:  # false for NaN, too
            raise UserError(f"tensor {name}: the merge is not finite in {layout[name][0]}; nothing was published")
        content = from_float32(result.astype(np.float32, copy=False), layout[name][0])
        rounded = widen(np.frombuffer(content, np.uint8), layout[name][0])
        report.append(
            {"tensor": name, "values": theta.size, "changed": float(np.mean(rounded != theta)) if theta.size else 0.0,
             "nonzero": " ".join(f"{np.count_nonzero(d) / max(d.size, 1):.6g}" for d in deltas),
             "delta_norms": " ".join(f"{float(np.linalg.norm(d)):.6g}" for d in deltas), "merged_norm": f"{float(np.linalg.norm(rounded - theta)):.6g}", **notes}
        )  # fmt: skip
        yield name, content


def _finite(name: str, entry: Entry) -> np.ndarray:
    values = as_float32(entry)
    if not np.isfinite(values).all():
        raise UserError(f"{entry.file}: tensor {name} holds a NaN or an infinity")
    return values
