"""Jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions, and from what jobs that have finished took.
"""

import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmfusion.io.files import format_bytes
from llmfusion.reporting.measured import Coefficients, read_measurement, seconds_of
from llmfusion.reporting.schedule import wall_seconds
from llmfusion.study.snakemake import WorkflowStudy
from llmfusion.study.workload import Assumptions, JobWork, Workload

# lines of the report in the order of the work; stages of other kinds follow
STAGES = (
    "data",
    "base models",
    "teacher caches",
    "generated answers",
    "trainings",
    "merges",
    "answers",
    "scores",
)
LINE = "{:18} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}"


class Estimate:
    """What a study takes: seconds of every job, and sums over jobs."""

    def __init__(self, workload: Workload, coefficients: Coefficients):
        self.workload = workload
        self.jobs = workload.jobs
        self.seconds = {address: self._seconds(address, job, coefficients) for address, job in self.jobs.items()}
        self.left = {address: job for address, job in self.jobs.items() if not workload.is_made(address)}

    def _seconds(self, address: str, job: JobWork, coefficients: Coefficients) -> float:
        is_made = self.workload.is_made(address)
        measurement = read_measurement(self.workload.directory, address) if is_made else None
        return measurement.seconds if measurement else seconds_of(job.work, coefficients[job.rates])

    def gpu_hours(self, jobs: Iterable[JobWork]) -> float:
        """Hours that GPUs are held, the start of each job on the cluster included."""
        return sum((self.seconds[job.address] + self.workload.assumed.scheduling) * job.gpus for job in jobs) / 3600

    def wall_hours(self, gpus: int) -> float:
        """Hours until everything that is left has been made.

        Raises :class:`ValueError` if one job needs more than ``gpus``.
        """
        seconds = {address: self.seconds[address] + self.workload.assumed.scheduling for address in self.left}
        return wall_seconds(self.left, seconds, gpus) / 3600

    def bytes_left(self, gpus: int) -> tuple[float, float]:
        """Bytes of what is left to make, and of resume states that exist at once with so many GPUs."""
        states = sorted((job.resume for job in self.left.values() if job.resume), reverse=True)
        most = max((job.gpus for job in self.left.values() if job.resume), default=1)
        return sum(job.disk for job in self.left.values()), sum(states[: max(1, gpus // most)])


def table_lines(estimate: Estimate, wall_hours: float, gpus: int) -> list[str]:
    """The estimate as lines of text: a table with a line a stage, and what is left to do."""
    jobs = list(estimate.jobs.values())
    stages = [*STAGES, *(job.report_stage for job in jobs)]
    out = [LINE.format("stage", "jobs", "done", "GPU-hours", "job-hours", "disk GB", "GB a GPU")]
    for stage in dict.fromkeys(stages):
        of_stage = [job for job in jobs if job.report_stage == stage]
        if of_stage:
            out.append(_line(stage, of_stage, estimate))
    out.append(_line("total", jobs, estimate))
    largest = max(jobs, key=lambda job: (job.gpu_memory, job.report_stage))
    limit = estimate.workload.assumed.gpu_memory
    if largest.gpu_memory > limit:
        need = f"{largest.report_stage} need up to {largest.gpu_memory / 1e9:,.0f} GB in one GPU"
        out += ["", f"memory: {need}, {limit / 1e9:,.0f} are assumed: see `sharding` in docs/cluster.md"]
    left = estimate.gpu_hours(estimate.left.values())
    return [*out, "", f"still to do: {left:,.1f} GPU-hours; wall time on {gpus} GPUs: {wall_hours:,.1f} hours"]


def _line(name: str, jobs: list[JobWork], estimate: Estimate) -> str:
    return LINE.format(
        name,
        len(jobs),
        sum(job.address not in estimate.left for job in jobs),
        _number(estimate.gpu_hours(jobs)),
        _number(sum(estimate.seconds[job.address] for job in jobs) / 3600),
        _number(sum(job.disk for job in jobs) / 1e9),
        _number(max(job.gpu_memory for job in jobs) / 1e9),
    )


def _number(value: float) -> str:
    return "-" if not value else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def constant_lines(assumed: Assumptions, counts: dict[str, int], given: list[str]) -> list[str]:
    """What the estimate rests on: how many jobs were measured, and every assumption; ``given`` are the user's own."""
    measured = ", ".join(f"{rates} ({count} jobs)" for rates, count in counts.items())
    names = {word.partition("=")[0] for word in given}
    out = [
        "",
        f"measured: {measured}" if counts else "measured: nothing yet; all times rest on these assumptions",
        "assumed:",
    ]
    for one in fields(assumed):
        mark = " (given)" if one.name in names else ""
        out.append(f"  {one.name:23} {getattr(assumed, one.name):<12g} {one.metadata['meaning']}{mark}")
    return out


def require_disk(workflow: Any, study: WorkflowStudy) -> None:
    """Refuse the jobs that Snakemake is about to start if the disk cannot hold what they make.

    Called before the first one, by the main process. Counts results, and of resume states the largest one: what is
    certain to exist. Raises ``SystemExit`` with a message for the user, which Snakemake shows as it is.
    """
    if not workflow.is_main_process:
        return
    workload = Workload(study.study, study.graph, Assumptions())
    planned = {workload.outputs.get(str(file)) for job in workflow.dag.needrun_jobs() for file in job.output}
    jobs = [workload.jobs[address] for address in planned if address]
    results = sum(job.disk for job in jobs)
    fits, message = check_disk(workload.directory, results, max((job.resume for job in jobs), default=0))
    if not fits:
        advice = "`llmfusion estimate` shows what this rests on; `--no-hooks` starts all the same"
        raise SystemExit(f"disk: {message}; nothing was started. {advice}")


def check_disk(place: Path, results: float, resume: float) -> tuple[bool, str]:
    """Whether so many bytes of results and of resume state fit the disk of ``place``, and a sentence that says so."""
    folder = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    parts = f"{format_bytes(results)} of results, {format_bytes(resume)} of resume states"
    message = f"{format_bytes(results + resume)} are needed ({parts}), {format_bytes(free)} are free in {folder}"
    fits = results + resume <= free
    return fits, message if fits else f"{message}: free some, or set the study's 'directory' to a larger place"
