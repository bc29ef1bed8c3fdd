"""Model cards: what a checkpoint is and where it comes from, readable where the folder ends up."""

from pathlib import Path
from typing import Any


def write_card(folder: Path, method: str, pivot: str, models: list[str], options: dict[str, Any]) -> None:
    """README.md of a merged checkpoint: method, parents and every option that was given."""
    given = [f"- {key}: {value}" for key, value in sorted(options.items()) if key != "method"] or ["- all defaults"]
    lines = [
        "# Merged model",
        "",
        f"Method `{method}`, merged with llm-fusion-workflow.",
        "",
        f"- pivot: {pivot}",
        *(f"- model: {m}" for m in models),
        "",
        "Options:",
        *given,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
