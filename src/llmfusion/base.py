"""Step ``base``: stage a base model (hub, path, gguf) or train it from scratch."""

import sys

from llmfusion.models.staging import KINDS
from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Fill the folder with a complete checkpoint."""
    spec = job.spec["base"]
    job.facts.update(KINDS[spec["kind"]](job, spec))
    print(f"{job.facts['architecture']}, {job.facts['parameters']:,} parameters")


if __name__ == "__main__":
    sys.exit(run("base", build))
