"""The small study as a workload, and its jobs as if they had been run on a machine of known speed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfusion.study.addresses import output_of
from llmfusion.study.snakemake import checked
from llmfusion.study.workload import Assumptions, JobWork, Workload, assumed_seconds
from tests.unit.mini_study import small

LOADING = ("pretrain", "train", "capture", "generate", "answer")  # rates of programs that record when their work begins


def study_file(
    folder: Path, name: str = "study", change: Callable[[dict[str, Any]], object] = lambda data: None
) -> Path:
    """The small study, changed, with its results below ``folder``."""
    data = small()
    data["directory"] = str(folder / name)
    change(data)
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(data))
    return file


def workload(file: Path, **assumed: float) -> Workload:
    """All jobs of a study."""
    return Workload(*checked(file), Assumptions(**assumed))


def slow_seconds(job: JobWork) -> float:
    """Seconds of a job on a machine a hundred thousand times slower than assumed, with starts of its own."""
    rates = assumed_seconds(Assumptions(start=4, light_start=1))[job.rates]
    return rates[0] + 1e5 * sum(amount * rate for amount, rate in zip(job.work[1:], rates[1:], strict=True))


def finish(jobs: Workload, seconds: Callable[[JobWork], float] = slow_seconds, noise: float = 0.0) -> None:
    """Write manifests and provenance as if every job had been run, and had taken ``seconds(job)``."""
    random_numbers = random.Random(0)
    for address, job in jobs.jobs.items():
        output = jobs.directory / output_of(address)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("{}")
        in_folder = output.name == "manifest.json"
        record = output.with_name("provenance.json") if in_folder else output.with_suffix(".provenance.json")
        took = round(seconds(job) * (1 + noise * random_numbers.uniform(-1, 1)), 4)
        start = 4 if job.rates in LOADING else None
        record.write_text(json.dumps({"seconds": took, "memory_mb": 512, "start_seconds": start}))
