"""Wall time of a study on a number of GPUs: what a scheduler does that always starts the job with the longest way to go."""

import heapq
from collections.abc import Mapping

from llmfusion.study.workload import Work


def wall_seconds(jobs: Mapping[str, Work], seconds: Mapping[str, float], gpus: int) -> float:
    """Seconds until the last job has ended, with ``gpus`` devices and cores for every job that needs none.

    Raises :class:`ValueError` if a job asks for more devices than there are.
    """
    most = max((job.gpus for job in jobs.values()), default=0)
    if most > gpus:
        name = next(address for address, job in jobs.items() if job.gpus == most)
        raise ValueError(f"{name} asks for {most} GPUs, {gpus} are given (--gpus)")
    to_go = _to_go(jobs, seconds)
    waiting = {address: sum(need in jobs for need in job.needs) for address, job in jobs.items()}
    followers: dict[str, list[str]] = {}
    for address, job in jobs.items():
        for need in job.needs:
            followers.setdefault(need, []).append(address)
    ready = [(-to_go[address], address) for address, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    free, now = gpus, 0.0
    while ready or running:
        held = []
        while ready:
            _, address = entry = heapq.heappop(ready)
            if jobs[address].gpus > free:
                held.append(entry)
                continue
            free -= jobs[address].gpus
            heapq.heappush(running, (now + seconds[address], address))
        for entry in held:
            heapq.heappush(ready, entry)
        now, done = heapq.heappop(running)
        free += jobs[done].gpus
        for address in followers.get(done, []):
            waiting[address] -= 1
            if not waiting[address]:
                heapq.heappush(ready, (-to_go[address], address))
    return now


def _to_go(jobs: Mapping[str, Work], seconds: Mapping[str, float]) -> dict[str, float]:
    """For each job the longest chain of seconds from its start to the end of all."""
    followers: dict[str, list[str]] = {}
    for address, job in jobs.items():
        for need in job.needs:
            followers.setdefault(need, []).append(address)
    out: dict[str, float] = {}

    def longest(address: str) -> float:
        if address not in out:
            out[address] = seconds[address] + max((longest(other) for other in followers.get(address, [])), default=0.0)
        return out[address]

    for address in jobs:
        longest(address)
    return out
