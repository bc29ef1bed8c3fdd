"""Step ``base``: stage a base model (hub, path, gguf) or train it from scratch."""

import sys
from typing import Any

from llmfusion import ROOT
from llmfusion.models.staging import KINDS
from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Fill the folder with a complete checkpoint."""
    from llmfusion.training.launch import in_processes

    spec = job.spec["base"]
    _need(job, spec)
    in_processes(job, spec.get("processes", 1), "llmfusion.base")
    print(f"{job.facts['architecture']}, {job.facts['parameters']:,} parameters")


def make(job: Job) -> None:
    """Fill the folder; of several processes the first writes."""
    spec = job.spec["base"]
    job.facts.update(KINDS[spec["kind"]](job, spec))


def _need(job: Job, spec: dict[str, Any]) -> None:
    """Refuse what the disk cannot hold, where the size is known before: models trained from another, and copies (links take no room)."""
    if spec["kind"] == "scratch" and "init" in spec:
        from llmfusion.training import checkpoint

        checkpoint.need(job, job.input(f"models/{spec['init']}").facts["parameters"], spec.get("save_dtype", "bfloat16"))
    if spec["kind"] == "path":
        weights, here = [path.stat() for path in (ROOT / spec["path"]).glob("*.safetensors")], job.folder.stat().st_dev
        job.need(f"a copy of {spec['path']}", sum(found.st_size for found in weights if found.st_dev != here))


if __name__ == "__main__":
    sys.exit(run("base", build))
