"""What each row of a table took, so that rows can be compared by cost.

A row's jobs are all those behind it, from its cells to the base models, as the manifests tell; rows share jobs, so that rows
do not add up. Seconds and memory come from Snakemake's benchmark files in ``logs/benchmarks``. A job without one is counted under
``not_measured``, and one that was interrupted counts with its last attempt.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError
from llmfusion.reporting.measured import measured
from llmfusion.study.addresses import manifest_of, output_of, whole_of
from llmfusion.study.kinds import gpus_of, kind_of

COLUMNS = (
    "table", "category", "label", "model", "jobs", "gpu_hours", "fusion_gpu_hours", "job_hours", "chain_hours",
    "peak_memory_mb", "peak_gpu_memory_mb", "device", "not_measured",
)  # fmt: skip


class Costs:
    """What stands behind the artifacts of one study's directory, and what its jobs took."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = cache(self._manifest)
        self.took = cache(lambda address: measured(directory, address))

    def _manifest(self, address: str) -> dict[str, Any]:
        whole = whole_of(address)  # a shard's folder need not be there any more
        path = manifest_of(self.directory / output_of(whole))
        try:
            content = json.loads(path.read_bytes())
            shards = self._shards(address)
            gpus = gpus_of(whole, content["spec"], len(shards))
            return {"inputs": sorted([*content["inputs"], *shards]), "spec": json.loads(content["spec"]), "gpus": gpus}
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedError(
                f"{path}: is missing or no manifest; llmfusion verify tells what else is wrong"
            ) from None

    def _shards(self, address: str) -> list[str]:
        """Jobs that did a part of this artifact's work; its manifest is the same without them."""
        took = self.took(address)
        return list(took.provenance.get("shards", [])) if took else []

    def rows(self, table: str) -> list[dict[str, Any]]:
        """One row of costs for each row of a table. Raises :class:`DamagedError` for a missing or unreadable manifest."""
        spec = self.manifest(f"tables/{table}")["spec"]
        out = []
        for models, category, label, *_ in spec["rows"]:
            cells = [f"scores/{model}/{task}" for model in models for task, _ in spec["tasks"]]
            out.append(
                {"table": table, "category": category, "label": label, "model": " ".join(models), **self._sum(cells)}
            )
        return out

    def _behind(self, cells: list[str]) -> set[str]:
        found, todo = set(cells), list(cells)
        while todo:
            new = set(self.manifest(todo.pop())["inputs"]) - found
            found |= new
            todo += new
        return found

    def _sum(self, cells: list[str]) -> dict[str, Any]:
        behind = self._behind(cells)
        known = {address: took for address in behind if (took := self.took(address)) is not None}
        hours = {address: took.seconds / 3600 for address, took in known.items()}
        gpus = {address: self.manifest(address)["gpus"] for address in behind}
        gpu_hours = {address: hours.get(address, 0.0) * gpus[address] for address in behind}
        fusion = sum(value for address, value in gpu_hours.items() if kind_of(address).is_fusion)
        devices = {took.provenance.get("gpu") or "cpu" for address, took in known.items() if gpus[address]}
        return {
            "jobs": len(behind),
            "gpu_hours": f"{sum(gpu_hours.values()):.6f}",
            "fusion_gpu_hours": f"{fusion:.6f}",
            "job_hours": f"{sum(hours.values()):.6f}",
            "chain_hours": f"{max(self._chain(cell, hours, {}) for cell in cells):.6f}",
            "peak_memory_mb": f"{max((took.memory_mb for took in known.values()), default=0):.0f}",
            "peak_gpu_memory_mb": max((took.provenance.get("gpu_peak_mb") or 0 for took in known.values()), default=0)
            or "",
            "device": " + ".join(sorted(devices)),
            "not_measured": len(behind) - len(known),
        }

    def _chain(self, address: str, hours: dict[str, float], seen: dict[str, float]) -> float:
        """Hours of the longest chain of jobs that ends with this one: the wall time on a cluster with room for all."""
        if address not in seen:
            before = [self._chain(other, hours, seen) for other in self.manifest(address)["inputs"]]
            seen[address] = hours.get(address, 0.0) + max(before, default=0.0)
        return seen[address]
