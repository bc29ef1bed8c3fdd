"""Jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions, and from the benchmark files of jobs that have finished.
"""

import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmfusion.io.files import format_bytes
from llmfusion.reporting.measured import measured, seconds_of
from llmfusion.reporting.schedule import wall_seconds
from llmfusion.study.snakemake import WorkflowStudy
from llmfusion.study.workload import Assumptions, Work, Workload


class Estimate:
    """What a study takes: seconds of every job, and sums over jobs."""

    def __init__(self, workload: Workload, coefficients: dict[str, tuple[float, ...]]):
        self.workload, self.jobs = workload, workload.jobs
        self.seconds = {address: self._seconds(address, job, coefficients) for address, job in self.jobs.items()}
        self.left = {address: job for address, job in self.jobs.items() if not workload.made(address)}

    def _seconds(self, address: str, job: Work, coefficients: dict[str, tuple[float, ...]]) -> float:
        took = measured(self.workload.directory, address) if self.workload.made(address) else None
        return took.seconds if took else seconds_of(job.work, coefficients[job.rates])

    def gpu_hours(self, jobs: Iterable[Work]) -> float:
        """Hours that GPUs are held, the start of each job on the cluster included."""
        return sum((self.seconds[job.address] + self.workload.assumed.scheduling) * job.gpus for job in jobs) / 3600

    def wall_hours(self, gpus: int) -> float:
        """Hours until everything that is left has been made; raises :class:`ValueError` if one job needs more than ``gpus``."""
        seconds = {address: self.seconds[address] + self.workload.assumed.scheduling for address in self.left}
        return wall_seconds(self.left, seconds, gpus) / 3600

    def bytes_left(self, gpus: int) -> tuple[float, float]:
        """Bytes of what is left to make, and of resume states that exist at once with so many GPUs."""
        states = sorted((job.resume for job in self.left.values() if job.resume), reverse=True)
        most = max((job.gpus for job in self.left.values() if job.resume), default=1)
        return sum(job.disk for job in self.left.values()), sum(states[: max(1, gpus // most)])


def table_lines(estimate: Estimate, wall: float, gpus: int) -> list[str]:
    line = "{:18} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}".format
    out = [line("stage", "jobs", "done", "GPU-hours", "job-hours", "disk GB", "GB a GPU")]
    for stage in dict.fromkeys(job.report_stage for job in estimate.jobs.values()):
        jobs = [job for job in estimate.jobs.values() if job.report_stage == stage]
        if jobs:
            out.append(_line(line, stage, jobs, estimate))
    out.append(_line(line, "total", list(estimate.jobs.values()), estimate))
    left = estimate.gpu_hours(estimate.left.values())
    most, limit = (
        max((job.gpu_memory, job.report_stage) for job in estimate.jobs.values()),
        estimate.workload.assumed.gpu_memory,
    )
    if most[0] > limit:
        out += [
            "",
            f"memory: {most[1]} need up to {most[0] / 1e9:,.0f} GB in one GPU, {limit / 1e9:,.0f} are assumed: see `sharding` in docs/cluster.md",
        ]
    return [*out, "", f"still to do: {left:,.1f} GPU-hours; wall time on {gpus} GPUs: {wall:,.1f} hours"]


def _line(line: object, name: str, jobs: list[Work], estimate: Estimate) -> str:
    done = sum(job.address not in estimate.left for job in jobs)
    hours = sum(estimate.seconds[job.address] for job in jobs) / 3600
    memory = max(job.gpu_memory for job in jobs)
    cells = (
        len(jobs),
        done,
        _number(estimate.gpu_hours(jobs)),
        _number(hours),
        _number(sum(job.disk for job in jobs) / 1e9),
        _number(memory / 1e9),
    )
    return line(name, *cells)  # type: ignore[operator]


def _number(value: float) -> str:
    return "-" if not value else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def constant_lines(assumed: Assumptions, counts: dict[str, int], given: list[str]) -> list[str]:
    told = ", ".join(f"{step} ({count} jobs)" for step, count in counts.items())
    out = [
        "",
        f"measured: {told}" if counts else "measured: nothing yet; all times rest on these assumptions",
        "assumed:",
    ]
    names = {word.partition("=")[0] for word in given}
    return out + [
        f"  {f.name:23} {getattr(assumed, f.name):<12g} {f.metadata['told']}{' (given)' if f.name in names else ''}"
        for f in fields(assumed)
    ]


def require_disk(workflow: Any, study: WorkflowStudy) -> None:
    """Refuse the jobs that Snakemake is about to start if the disk cannot hold what they make.

    Called before the first one, by the main process. Counts results, and of resume states the largest one: what is sure to exist.
    Raises ``SystemExit`` with words for the user, which Snakemake shows as they are.
    """
    if not workflow.is_main_process:
        return
    workload = Workload(study.study, study.graph, Assumptions())
    planned = {workload.outputs.get(str(file)) for job in workflow.dag.needrun_jobs() for file in job.output}
    jobs = [workload.jobs[address] for address in planned if address]
    fits, told = room(workload.directory, sum(job.disk for job in jobs), max((job.resume for job in jobs), default=0))
    if not fits:
        raise SystemExit(
            f"disk: {told}; nothing was started. `llmfusion estimate` shows what this rests on; `--no-hooks` starts all the same"
        )


def room(place: Path, results: float, states: float) -> tuple[bool, str]:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    told = f"{format_bytes(results + states)} are needed ({format_bytes(results)} of results, {format_bytes(states)} of resume states), {format_bytes(free)} are free in {there}"
    fits = results + states <= free
    return fits, told if fits else f"{told}: free some, or set the study's 'directory' to a larger place"
