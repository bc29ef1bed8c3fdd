"""What a merge did, tensor by tensor and in all: ``merge_report.csv``, ``merge_report.json`` and the model card."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.errors import require
from llmfusion.merging.blocks import PivotDeltas, TensorMerge
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.options import MergeOptions

Row = dict[str, Any]


def report_row(name: str, tensor: PivotDeltas, merge: TensorMerge, changed: int, squares: float) -> Row:
    """A tensor's row: its values, the share that differs from the pivot after rounding, and the method's notes.

    ``nonzero`` and ``delta_norms`` have a figure a model; ``sign_conflicts`` is the share of positions where deltas of
    both signs meet; ``kept`` is the share of the deltas' squares that took part, ``merged_norm`` the norm of merge
    minus pivot.
    """
    size = max(tensor.size, 1)
    figures = {
        "tensor": name,
        "values": tensor.size,
        "changed": changed / size,
        "nonzero": " ".join(f"{count / size:.6g}" for count in tensor.nonzero),
        "sign_conflicts": tensor.conflicts / size,
        "delta_norms": " ".join(f"{norm:.6g}" for norm in np.sqrt(tensor.energies)),
        "merged_norm": f"{squares**0.5:.6g}",
        "kept": float(merge.kept),
        "energy": float(tensor.energies.sum()),
    }
    return figures | {key: float(value) for key, value in merge.notes.items()}


COLUMNS = (
    "tensor",
    "values",
    "changed",
    "nonzero",
    "sign_conflicts",
    "delta_norms",
    "merged_norm",
    "kept",
    "energy",
)  # of every report; a method's notes follow


def require_own_notes(method: str, notes: Mapping[str, float]) -> None:
    """Raise :class:`UserError` for a note with the name of a column of every report."""
    reserved = sorted(set(notes) & set(COLUMNS))
    require(not reserved, f"merge method {method}: a note cannot be called {', '.join(reserved)}: the report has it")


def require_same_notes(method: str, row: Row, first: Row) -> None:
    """Raise :class:`UserError` where a tensor's row has other notes than the first one's: the table has one header."""
    notes, expected = (", ".join(sorted(set(each) - set(COLUMNS))) or "none" for each in (row, first))
    message = (
        f"merge method {method}: tensor {row['tensor']} has the notes {notes}, tensor {first['tensor']} {expected}"
    )
    require(notes == expected, f"{message}; a method gives the same for every tensor")


def totals(rows: Sequence[Row], method: str, floor: float) -> dict[str, Any]:
    """Counts and shares over all tensors.

    ``warning`` where less than ``floor`` of the deltas was kept, or of the values changed.
    """
    values = sum(row["values"] for row in rows)
    energy = sum(row["energy"] for row in rows)
    facts: dict[str, Any] = {"tensors": len(rows), "parameters": values}
    facts["changed"] = sum(row["changed"] * row["values"] for row in rows) / values if values else 0.0
    facts["kept"] = sum(row["kept"] * row["energy"] for row in rows) / energy if energy else 1.0
    reasons = []
    if facts["kept"] < floor:
        reasons.append(f"{method} kept {facts['kept']:.3%} of the sum of squares of the deltas")
    if facts["changed"] < floor:
        reasons.append(f"{facts['changed']:.3%} of the values differ from the pivot's after rounding")
    if reasons:
        facts["warning"] = f"the merge is nearly the pivot: {' and '.join(reasons)} (warn_below is {floor:.0%})"
    return facts


def write_report(folder: Path, options: MergeOptions, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Both files; the table has a row a tensor, in the order of the pivot's files."""
    with open(folder / "merge_report.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "method": options.method,
        "options": dump(options, "method", "pivot", "parents"),
        "totals": facts,
        "tensors": list(rows),
    }
    (folder / "merge_report.json").write_text(json.dumps(_without_infinities(content), indent=1) + "\n")


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity: the threshold of a selection of nothing is null there."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_card(
    folder: Path, options: MergeOptions, pivot: str, models: list[str], facts: dict[str, Any], licences: Sequence[str]
) -> None:
    """README.md of a merged checkpoint: method, parents, every option in force, what the merge changed, licences.

    ``licences``: a line for each, with what it comes with.
    """
    effect = (
        f"{facts['parameters']:,} values in {facts['tensors']} tensors; {facts['changed']:.2%} of them differ "
        f"from the pivot's, and {facts['kept']:.2%} of the"
    )
    lines = [
        "---",
        "tags: [merge, llm-fusion-workflow]",
        "---",
        "",
        "# Merged model",
        "",
        f"Method `{options.method}`, merged with llm-fusion-workflow.",
        "",
        f"- pivot: {pivot}",
        *(f"- model: {model}" for model in models),
        "",
        "Options:",
        *[f"- {key}: {value}" for key, value in sorted(in_force(options).items())],
        "",
        effect,
        "sum of squares of the models' differences took part. `merge_report.csv` and `merge_report.json` say so for "
        "each tensor.",
        *(["", f"**Warning**: {facts['warning']}."] if "warning" in facts else []),
        "",
        "Licences stated for what it was made from:",
        *licences,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


def in_force(options: MergeOptions) -> dict[str, Any]:
    """Every option of a method with the value it has, defaults included."""
    return options.model_dump(mode="json", by_alias=True, exclude={"method", "pivot", "parents"})


def summary(facts: dict[str, Any]) -> str:
    """One line for logs."""
    return f"{facts['tensors']} tensors, {facts['parameters']:,} values, {facts['changed']:.1%} of them changed"
