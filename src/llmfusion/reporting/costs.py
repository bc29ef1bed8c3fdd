"""What each row of a table took, so that rows can be compared by cost.

A row's jobs are all those behind it, from its cells to the base models, as the manifests say; rows share jobs, so
that rows do not add up. Seconds and memory are what each job recorded in its provenance. A job without such a
record is counted under ``not_measured``, and one that was interrupted counts with its last attempt.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from llmfusion.errors import DamagedError
from llmfusion.reporting.measured import read_measurement
from llmfusion.study.addresses import manifest_of, output_of, whole_of
from llmfusion.study.kinds import gpus_of, kind_of

COLUMNS = (
    "table",
    "category",
    "label",
    "model",
    "jobs",
    "gpu_hours",
    "fusion_gpu_hours",
    "job_hours",
    "chain_hours",
    "peak_memory_mb",
    "peak_gpu_memory_mb",
    "device",
    "not_measured",
)


def costs_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of :meth:`Costs.rows` as CSV."""
    return str(pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).to_csv(index=False, lineterminator="\n"))


class Costs:
    """The artifacts in one study's directory with what they were made from, and what their jobs took."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = cache(self._manifest)
        self.measurement = cache(lambda address: read_measurement(directory, address))

    def _manifest(self, address: str) -> dict[str, Any]:
        whole = whole_of(address)  # a shard's folder need not be there any more
        path = manifest_of(self.directory / output_of(whole))
        try:
            content = json.loads(path.read_bytes())
            shards = self._shards(address)
            gpus = gpus_of(whole, content["spec"], len(shards))
            return {"inputs": sorted([*content["inputs"], *shards]), "spec": json.loads(content["spec"]), "gpus": gpus}
        except (OSError, ValueError, KeyError, TypeError):
            advice = "llmfusion verify reports what else is wrong"
            raise DamagedError(f"{path}: is missing or no manifest; {advice}") from None

    def _shards(self, address: str) -> list[str]:
        """Jobs that did a part of this artifact's work; its manifest is the same without them."""
        measurement = self.measurement(address)
        return list(measurement.provenance.get("shards", [])) if measurement else []

    def rows(self, table: str) -> list[dict[str, Any]]:
        """A row of costs for each row of a table. Raises :class:`DamagedError` for a missing or damaged manifest."""
        spec = self.manifest(f"tables/{table}")["spec"]
        out = []
        for models, category, label, *_ in spec["rows"]:
            cells = [f"scores/{model}/{task}" for model in models for task, _ in spec["tasks"]]
            description = {"table": table, "category": category, "label": label, "model": " ".join(models)}
            out.append(description | self._sum(cells))
        return out

    def _ancestors(self, cells: list[str]) -> set[str]:
        """The cells, and everything that they were made from."""
        out = set(cells)
        todo = list(cells)
        while todo:
            new = set(self.manifest(todo.pop())["inputs"]) - out
            out |= new
            todo += new
        return out

    def _sum(self, cells: list[str]) -> dict[str, Any]:
        jobs = self._ancestors(cells)
        measured = {job: measurement for job in jobs if (measurement := self.measurement(job)) is not None}
        hours = {job: measurement.seconds / 3600 for job, measurement in measured.items()}
        gpus = {job: self.manifest(job)["gpus"] for job in jobs}
        gpu_hours = {job: hours.get(job, 0.0) * gpus[job] for job in jobs}
        fusion = sum(value for job, value in gpu_hours.items() if kind_of(job).is_fusion)
        devices = {one.provenance.get("gpu") or "cpu" for job, one in measured.items() if gpus[job]}
        gpu_memory = max((one.provenance.get("gpu_peak_mb") or 0 for one in measured.values()), default=0)
        return {
            "jobs": len(jobs),
            "gpu_hours": f"{sum(gpu_hours.values()):.6f}",
            "fusion_gpu_hours": f"{fusion:.6f}",
            "job_hours": f"{sum(hours.values()):.6f}",
            "chain_hours": f"{max(self._chain(cell, hours, {}) for cell in cells):.6f}",
            "peak_memory_mb": f"{max((one.memory_mb for one in measured.values()), default=0):.0f}",
            "peak_gpu_memory_mb": gpu_memory or "",
            "device": " + ".join(sorted(devices)),
            "not_measured": len(jobs) - len(measured),
        }

    def _chain(self, address: str, hours: dict[str, float], seen: dict[str, float]) -> float:
        """Hours of the longest chain of jobs that ends with this one: the wall time on a cluster with room for all."""
        if address not in seen:
            before = [self._chain(other, hours, seen) for other in self.manifest(address)["inputs"]]
            seen[address] = hours.get(address, 0.0) + max(before, default=0.0)
        return seen[address]
