"""Jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions, and from what jobs that have finished took.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmfusion.io.files import format_bytes
from llmfusion.reporting.machine import assumptions_for
from llmfusion.reporting.measured import Coefficients, fit_coefficients, read_measurement
from llmfusion.reporting.schedule import wall_seconds
from llmfusion.study.addresses import TABLES
from llmfusion.study.graph import ArtifactGraph
from llmfusion.study.scales import SCALES
from llmfusion.study.schema.study import Study
from llmfusion.study.sizes import ModelSize
from llmfusion.study.snakemake import WorkflowStudy
from llmfusion.study.workload import Assumptions, JobWork, Workload, assumed_seconds, seconds_of

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
HEADS = {  # whether jobs that run a model have GPUs
    True: ("GPU-hours", "job-hours", "disk GB", "GB a GPU"),
    False: ("model-h", "job-hours", "disk GB", "memory GB"),
}
LINE = "{:18} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}"
SAVE_SECONDS = 900  # a training saves its state so often, and keeps two beside the one that is being written
STATES = 3


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that the study's disk must hold beside what is there already."""

    results: float
    resume: float  # states of the trainings that run at once
    drafts: float  # of what is made anew beside its old copy, by the jobs that run at once
    unknown: tuple[str, ...]  # base models of unknown size: what is made from them is not counted

    @property
    def total(self) -> float:
        """All bytes that are counted."""
        return self.results + self.resume + self.drafts


class Estimate:
    """What a study takes: seconds of every job, and sums over jobs.

    ``jobs`` are those behind ``targets`` (addresses; default: all tables), ``left`` those that are to be made for them.
    """

    def __init__(self, workload: Workload, coefficients: Coefficients, targets: Iterable[str] | None = None):
        self.workload = workload
        asked = tables_of(workload) if targets is None else list(targets)
        self.jobs = {address: workload.jobs[address] for address in workload.behind(asked)}
        self.left = {address: workload.jobs[address] for address in workload.behind(asked, until_made=True)}
        self.seconds = {address: self._seconds(address, job, coefficients) for address, job in workload.jobs.items()}

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
        assumed = self.workload.assumed
        jobs = self.left
        if not assumed.uses_gpus:  # every job takes a core
            jobs = {address: replace(job, gpus=max(1, job.gpus)) for address, job in jobs.items()}
        seconds = {address: self.seconds[address] + assumed.scheduling for address in jobs}
        return wall_seconds(jobs, seconds, gpus) / 3600

    @property
    def devices(self) -> int:
        """GPUs, or without them cores, that are counted with unless a number is given; enough for every job."""
        most = max((job.gpus for job in self.left.values()), default=0)
        return max(SCALES[self.workload.study.scale].devices, most)

    def trainings_at_once(self, gpus: int) -> int:
        """How many trainings run at once with so many devices."""
        return max(1, gpus // max((job.gpus for job in self.left.values() if job.resume), default=1))

    def disk_need(self, at_once: int, planned: Iterable[str] | None = None) -> DiskNeed:
        """Bytes of what is ``planned`` (default: all that is left), of which ``at_once`` jobs run at a time."""
        addresses = set(self.left if planned is None else planned)
        jobs = [self.workload.jobs[address] for address in sorted(addresses)]
        known = [job for job in jobs if not job.guessed]
        again = {job.address for job in known if self.workload.is_made(job.address)}
        return DiskNeed(
            results=sum(job.disk for job in known if job.address not in again),
            resume=_largest((self._resume_bytes(job) for job in known), at_once),
            drafts=_largest((job.disk for job in known if job.address in again), at_once),
            unknown=tuple(sorted({base for job in jobs for base in job.guessed})),
        )

    def _resume_bytes(self, job: JobWork) -> float:
        """Of one state, for which there must be room from the start, and of those that are saved as time goes by."""
        return job.resume * min(STATES, 1 + self.seconds[job.address] // SAVE_SECONDS)


def _largest(sizes: Iterable[float], count: int) -> float:
    return sum(sorted(sizes, reverse=True)[:count])


def tables_of(workload: Workload) -> list[str]:
    """Addresses of all tables: what Snakemake makes where no target is named."""
    return [address for address in workload.jobs if address.startswith(TABLES)]


def estimate_of(
    study: Study,
    graph: ArtifactGraph,
    assumed: Assumptions,
    targets: Iterable[str] | None = None,
    measured_by: Workload | None = None,
    hub: Mapping[str, ModelSize] | None = None,
) -> tuple[Estimate, dict[str, int]]:
    """The estimate of a study, and how many finished jobs its coefficients rest on, by the name of their rates.

    ``measured_by``: another study whose jobs are looked at instead; ``hub``: sizes of base models that the hub told.
    """
    workload = Workload(study, graph, assumed, hub)
    coefficients, counts = fit_coefficients(assumed_seconds(assumed), measured_by or workload)
    return Estimate(workload, coefficients, targets), counts


def table_lines(estimate: Estimate, wall_hours: float, gpus: int) -> list[str]:
    """The estimate as lines of text: a table with a line a stage, and what is left to do."""
    jobs = list(estimate.jobs.values())
    assumed = estimate.workload.assumed
    stages = [*STAGES, *(job.report_stage for job in jobs)]
    out = [LINE.format("stage", "jobs", "done", *HEADS[assumed.uses_gpus])]
    for stage in dict.fromkeys(stages):
        of_stage = [job for job in jobs if job.report_stage == stage]
        if of_stage:
            out.append(_line(stage, of_stage, estimate))
    out.append(_line("total", jobs, estimate))
    largest = max(jobs, key=lambda job: (job.gpu_memory, job.report_stage))
    limit = assumed.gpu_memory
    if largest.gpu_memory > limit:
        need = f"{largest.report_stage} need up to {largest.gpu_memory / 1e9:,.0f} GB"
        gpu = f"{need} in one GPU, {limit / 1e9:,.0f} are assumed: see `sharding` in docs/cluster.md"
        here = f"{need}, this machine has {limit / 1e9:,.0f}: take a smaller micro_batch_size or a smaller model"
        out += ["", f"memory: {gpu if assumed.uses_gpus else here}"]
    left = estimate.gpu_hours(estimate.left.values())
    if not assumed.uses_gpus:
        jobs_at_once = "one job" if gpus == 1 else f"{gpus} jobs"
        speed = f"without a GPU, at {assumed.peak / 1e9:,.0f} GFLOP/s a core"
        return [*out, "", f"still to do: {wall_hours:,.2g} hours, {jobs_at_once} at a time, {speed}"]
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


def unknown_lines(estimate: Estimate) -> list[str]:
    """A line for each base model of unknown size that the estimate rests on: what it is taken for, and what to do."""
    entries: dict[str, Any] = dict(estimate.workload.study.models.base)
    names = sorted({base for job in estimate.left.values() for base in job.guessed})
    out = []
    for name in names:
        entry = entries[name.split("/")[1]]
        place = entry.repo if entry.kind == "hub" else entry.path
        why = "is not downloaded yet" if entry.kind == "hub" else "has no headers that can be read"
        way = "ask the hub with --staging, or give" if entry.kind == "hub" else "put its files in place, or give"
        taken = f"{estimate.workload.assumed.parameters:.2g} parameters are assumed, and its disk is not counted"
        todo = f"{way} its entry a key `parameters`, or --assume parameters=N"
        out.append(f"size unknown: {name}: {place} {why}, and its name does not tell; {taken}: {todo}")
    return out


def constant_lines(assumed: Assumptions, counts: dict[str, int]) -> list[str]:
    """What the estimate rests on: how many jobs were measured, and every assumption."""
    measured = ", ".join(f"{rates} ({count} jobs)" for rates, count in counts.items())
    out = [
        "",
        f"measured: {measured}" if counts else "measured: nothing yet; all times rest on these assumptions",
        "assumed:",
    ]
    for name, meaning in assumed.named().items():
        mark = " (given)" if name in assumed.given else ""
        out.append(f"  {name:23} {getattr(assumed, name):<12g} {meaning}{mark}")
    return out


def require_disk(workflow: Any, study: WorkflowStudy) -> None:
    """Refuse the jobs that Snakemake is about to start if the disk cannot hold what they make.

    Called before the first one, by the main process. Raises ``SystemExit`` with a message for the user, which Snakemake
    shows as it is.
    """
    if not workflow.is_main_process:
        return
    estimate, _ = estimate_of(study.study, study.graph, assumptions_for(study.study.scale))
    outputs = estimate.workload.outputs
    planned = [outputs.get(str(file)) for job in workflow.dag.needrun_jobs() for file in job.output]
    need = estimate.disk_need(_jobs_at_once(workflow), [address for address in planned if address])
    fits, message = check_disk(estimate.workload.directory, need)
    if not fits:
        advice = (
            "`llmfusion estimate` shows what this rests on; `--no-hooks` starts all the same, but a job that fails "
            "then loses the result that it was to make again"
        )
        raise SystemExit(f"disk: {message}; nothing was started. {advice}")


def _jobs_at_once(workflow: Any) -> int:
    """Jobs that run a model at once here; one where a cluster decides: each job looks at the disk again."""
    if not workflow.local_exec:
        return 1
    gpus = getattr(workflow.global_resources.get("gpu"), "value", None)  # given with --resources gpu=N
    return max(1, workflow.cores if gpus is None else min(gpus, workflow.cores))


def check_disk(place: Path, need: DiskNeed) -> tuple[bool, str]:
    """Whether the disk of ``place`` can hold what is needed, and a sentence that says so."""
    folder = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    parts = [f"{format_bytes(need.results)} of results", f"{format_bytes(need.resume)} of resume states"]
    parts += [f"{format_bytes(need.drafts)} of what is made again beside its old copy"] if need.drafts else []
    message = f"{format_bytes(need.total)} are needed ({', '.join(parts)}), {format_bytes(free)} are free in {folder}"
    if need.unknown:
        message += f"; not counted: what is made from {', '.join(need.unknown)}, whose size nothing tells yet"
    fits = need.total <= free
    return fits, message if fits else f"{message}: free some, or set the study's 'directory' to a larger place"
