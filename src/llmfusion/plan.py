"""``python -m llmfusion.plan [STUDY]``: jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions (``--assume mfu=0.3``), and from the benchmark files of jobs that have finished: the
study's own, or with ``--measured-by`` those of another study on the same machine. Exit status 1 if the disk will not hold it.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.config.errors import StudyError
from llmfusion.config.workflow import StudyPlan, checked
from llmfusion.costs.measured import measured, refined, seconds_of
from llmfusion.costs.schedule import wall_seconds
from llmfusion.costs.work import STAGES, Assumptions, Work, Workload, assumed_seconds
from llmfusion.step import amount


class Estimate:
    """What a study takes: seconds of every job, and sums over jobs."""

    def __init__(self, workload: Workload, coefficients: dict[str, tuple[float, ...]]):
        self.workload, self.jobs = workload, workload.jobs
        self.seconds = {address: self._seconds(address, job, coefficients) for address, job in self.jobs.items()}
        self.left = {address: job for address, job in self.jobs.items() if not workload.made(address)}

    def _seconds(self, address: str, job: Work, coefficients: dict[str, tuple[float, ...]]) -> float:
        took = measured(self.workload.directory, address) if self.workload.made(address) else None
        return took.seconds if took else seconds_of(job.work, coefficients[job.step])

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


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate. Returns the exit status: 0, 1 if the disk is too small, 2 for mistakes in what was given."""
    parser = argparse.ArgumentParser(prog="python -m llmfusion.plan", description="What will a study take?")
    parser.add_argument("study", nargs="?", type=Path, default=ROOT / "config/config.yaml", metavar="STUDY", help="study file (default: the paper's)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that work at once (default: 8)")
    parser.add_argument("--measured-by", type=Path, metavar="STUDY", help="another study, made on the same machine, whose finished jobs show the constants")
    parser.add_argument("--assume", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other assumptions, e.g. mfu=0.3 tokens_per_sample=700")
    given = parser.parse_args(arguments)
    try:
        assumed = Assumptions.given(given.assume)
        workload = Workload(*checked(given.study), assumed)
        teacher = Workload(*checked(given.measured_by), assumed) if given.measured_by else workload
        coefficients, counts = refined(assumed_seconds(assumed), teacher)
        estimate = Estimate(workload, coefficients)
        wall = estimate.wall_hours(given.gpus)
    except (StudyError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{workload.study.title}: {len(estimate.jobs)} jobs, {len(estimate.jobs) - len(estimate.left)} of them done\n")
    print("\n".join(_table(estimate, wall, given.gpus)))
    print("\n".join(_constants(assumed, counts, given.assume)))
    return _disk(estimate, given.gpus)


def _table(estimate: Estimate, wall: float, gpus: int) -> list[str]:
    line = "{:18} {:>5} {:>5} {:>10} {:>10} {:>10} {:>12}".format
    out = [line("stage", "jobs", "done", "GPU-hours", "job-hours", "disk GB", "GB a GPU")]
    for stage in dict.fromkeys(STAGES.values()):
        jobs = [job for job in estimate.jobs.values() if STAGES[job.step] == stage]
        if jobs:
            out.append(_line(line, stage, jobs, estimate))
    out.append(_line(line, "total", list(estimate.jobs.values()), estimate))
    left = estimate.gpu_hours(estimate.left.values())
    most, limit = max((job.memory, STAGES[job.step]) for job in estimate.jobs.values()), estimate.workload.assumed.gpu_memory
    if most[0] > limit:
        out += ["", f"memory: {most[1]} need up to {most[0] / 1e9:,.0f} GB in one GPU, {limit / 1e9:,.0f} are assumed: see `sharding` in docs/cluster.md"]
    return [*out, "", f"still to do: {left:,.1f} GPU-hours; wall time on {gpus} GPUs: {wall:,.1f} hours"]


def _line(line: object, name: str, jobs: list[Work], estimate: Estimate) -> str:
    done = sum(job.address not in estimate.left for job in jobs)
    hours = sum(estimate.seconds[job.address] for job in jobs) / 3600
    memory = max(job.memory for job in jobs)
    cells = (len(jobs), done, _number(estimate.gpu_hours(jobs)), _number(hours), _number(sum(job.disk for job in jobs) / 1e9), _number(memory / 1e9))
    return line(name, *cells)  # type: ignore[operator]


def _number(value: float) -> str:
    return "-" if not value else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _constants(assumed: Assumptions, counts: dict[str, int], given: list[str]) -> list[str]:
    told = ", ".join(f"{step} ({count} jobs)" for step, count in counts.items())
    out = ["", f"measured: {told}" if counts else "measured: nothing yet; all times rest on these assumptions", "assumed:"]
    names = {word.partition("=")[0] for word in given}
    return out + [f"  {f.name:23} {getattr(assumed, f.name):<12g} {f.metadata['told']}{' (given)' if f.name in names else ''}" for f in fields(assumed)]


def require_disk(workflow: Any, study: StudyPlan) -> None:
    """Refuse the jobs that Snakemake is about to start if the disk cannot hold what they make.

    Called before the first one, by the main process. Counts results, and of resume states the largest one: what is sure to exist.
    Raises ``SystemExit`` with words for the user, which Snakemake shows as they are.
    """
    if not workflow.is_main_process:
        return
    workload = Workload(study.study, study.plan, Assumptions())
    planned = {workload.outputs.get(str(file)) for job in workflow.dag.needrun_jobs() for file in job.output}
    jobs = [workload.jobs[address] for address in planned if address]
    fits, told = _room(workload.directory, sum(job.disk for job in jobs), max((job.resume for job in jobs), default=0))
    if not fits:
        raise SystemExit(f"disk: {told}; nothing was started. `python -m llmfusion.plan` shows what this rests on; `--no-hooks` starts all the same")


def _room(place: Path, results: float, states: float) -> tuple[bool, str]:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    told = f"{amount(results + states)} are needed ({amount(results)} of results, {amount(states)} of resume states), {amount(free)} are free in {there}"
    fits = results + states <= free
    return fits, told if fits else f"{told}: free some, or set the study's 'directory' to a larger place"


def _disk(estimate: Estimate, gpus: int) -> int:
    fits, told = _room(estimate.workload.directory, *estimate.bytes_left(gpus))
    print(f"\ndisk: {told}" if fits else f"\ndisk: {told}; nothing was started", file=sys.stdout if fits else sys.stderr)
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
