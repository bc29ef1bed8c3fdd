"""Wall time of a study on a number of GPUs by list scheduling: jobs with the longest chain after them start first."""

import heapq
from collections.abc import Mapping

from llmfusion.study.workload import JobWork


def wall_seconds(jobs: Mapping[str, JobWork], seconds: Mapping[str, float], gpus: int) -> float:
    """Seconds until the last job has ended, with ``gpus`` devices and cores for every job that needs none.

    Raises :class:`ValueError` if a job asks for more devices than there are.
    """
    most = max((job.gpus for job in jobs.values()), default=0)
    if most > gpus:
        name = next(address for address, job in jobs.items() if job.gpus == most)
        raise ValueError(f"{name} asks for {most} GPUs, {gpus} are given (--gpus)")
    followers = _followers(jobs)
    priority = _longest_chains(jobs, seconds, followers)
    waiting = {address: sum(need in jobs for need in job.needs) for address, job in jobs.items()}
    ready = [(-priority[address], address) for address, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []  # by the second of its end
    free = gpus
    now = 0.0
    while ready or running:
        free = _start_ready(jobs, seconds, ready, running, free, now)
        now, done = heapq.heappop(running)
        free += jobs[done].gpus
        for address in followers.get(done, []):
            waiting[address] -= 1
            if not waiting[address]:
                heapq.heappush(ready, (-priority[address], address))
    return now


def _start_ready(
    jobs: Mapping[str, JobWork],
    seconds: Mapping[str, float],
    ready: list[tuple[float, str]],
    running: list[tuple[float, str]],
    free: int,
    now: float,
) -> int:
    """Move jobs that ``free`` devices suffice for from ``ready`` to ``running``. Returns the devices still free."""
    held = []
    while ready:
        entry = heapq.heappop(ready)
        address = entry[1]
        if jobs[address].gpus > free:
            held.append(entry)
            continue
        free -= jobs[address].gpus
        heapq.heappush(running, (now + seconds[address], address))
    for entry in held:
        heapq.heappush(ready, entry)
    return free


def _followers(jobs: Mapping[str, JobWork]) -> dict[str, list[str]]:
    """Jobs that need each artifact."""
    out: dict[str, list[str]] = {}
    for address, job in jobs.items():
        for need in job.needs:
            out.setdefault(need, []).append(address)
    return out


def _longest_chains(
    jobs: Mapping[str, JobWork], seconds: Mapping[str, float], followers: Mapping[str, list[str]]
) -> dict[str, float]:
    """For each job the longest chain of seconds from its start to the end of all."""
    out: dict[str, float] = {}

    def longest(address: str) -> float:
        if address not in out:
            out[address] = seconds[address] + max((longest(other) for other in followers.get(address, [])), default=0.0)
        return out[address]

    for address in jobs:
        longest(address)
    return out
