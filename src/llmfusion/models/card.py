"""Model cards: what a checkpoint is and where it comes from, readable where the folder ends up."""

from pathlib import Path
from typing import Any


def write_card(folder: Path, method: str, pivot: str, models: list[str], options: dict[str, Any], facts: dict[str, Any]) -> None:
    """README.md of a merged checkpoint: method, parents, every option in force, and what the merge changed."""
    lines = [
        "---",
        "tags: [merge, llm-fusion-workflow]",
        "---",
        "",
        "# Merged model",
        "",
        f"Method `{method}`, merged with llm-fusion-workflow.",
        "",
        f"- pivot: {pivot}",
        *(f"- model: {m}" for m in models),
        "",
        "Options:",
        *[f"- {key}: {value}" for key, value in sorted(options.items())],
        "",
        f"{facts['parameters']:,} values in {facts['tensors']} tensors; {facts['changed']:.2%} of them differ from the pivot's, and {facts['kept']:.2%} of the",
        "sum of squares of the models' differences took part. `merge_report.csv` and `merge_report.json` say so for each tensor.",
        *(["", f"**Warning**: {facts['warning']}."] if "warning" in facts else []),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
