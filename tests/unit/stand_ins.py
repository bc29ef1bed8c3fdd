"""Stand-ins for what the workflow would hand to a step: artifacts without a manifest file, jobs without a lease."""

import json
from pathlib import Path
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.store import Artifact

ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
STAND_IN = {"data/dataset/stand-in": "mit"}  # licence and origin of every stand-in that says nothing else


def artifact(folder: Path, **facts: Any) -> Artifact:
    """The files of ``folder`` as an artifact with these facts, of a source with a licence."""
    files = {str(p.relative_to(folder)): {} for p in sorted(folder.rglob("*")) if p.is_file()}
    stated = {"license": STAND_IN, **facts}
    manifest = {"spec": "{}", "fingerprint": "f" * 64, "inputs": {}, "files": files, "facts": stated}
    return Artifact(folder, manifest, "0" * 64)


def job(
    tmp_path: Path,
    spec: dict[str, Any] | None = None,
    inputs: dict[str, Artifact] | None = None,
    name: str = "job",
    **changed: Any,
) -> Job:
    """A job writing into ``tmp_path/NAME/out``; the same name gives the same place for resume state."""
    given = {"key": "f", "time_limit_minutes": None, **changed}
    out = Job(
        json.dumps({"step": "test", "recipe": 1, **(spec or {})}),
        inputs or {},
        tmp_path / name / "out",
        tmp_path / name / "work",
        {},
        **given,
    )
    out.folder.mkdir(parents=True, exist_ok=True)
    out.work.mkdir(exist_ok=True)
    return out


def question(name: str, *turns: str) -> dict[str, Any]:
    """A sample of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {
        "id": name,
        "domain": "general",
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)],
    }
