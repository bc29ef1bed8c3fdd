"""Schedules against small puzzles."""

import pytest

from llmfusion.reporting.schedule import wall_seconds
from llmfusion.study.workload import JobWork


def puzzle(**jobs: tuple[int, str]) -> dict[str, JobWork]:
    return {
        name: JobWork(name, "train", "trainings", tuple(needs), (1.0,), gpus, 0, 0, 0)
        for name, (gpus, needs) in jobs.items()
    }


@pytest.mark.parametrize(
    ("jobs", "seconds", "gpus", "wall"),
    [
        (puzzle(a=(1, ""), b=(1, ""), c=(1, "")), {"a": 5, "b": 5, "c": 5}, 2, 10),
        (puzzle(a=(1, ""), b=(1, ""), c=(1, "a")), {"a": 2, "b": 9, "c": 7}, 1, 18),
        (puzzle(a=(1, ""), b=(1, ""), c=(1, "a")), {"a": 2, "b": 9, "c": 7}, 2, 9),
        (
            puzzle(a=(2, ""), b=(1, ""), c=(0, "b")),
            {"a": 5, "b": 5, "c": 3},
            2,
            10,
        ),  # the longer way first: b, then a beside c
        (puzzle(a=(0, ""), b=(0, ""), c=(0, "ab")), {"a": 4, "b": 6, "c": 1}, 1, 7),
    ],
)
def test_the_wall_time_of_small_puzzles(
    jobs: dict[str, JobWork], seconds: dict[str, float], gpus: int, wall: float
) -> None:
    assert wall_seconds(jobs, seconds, gpus) == wall


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a asks for 8 GPUs, 4 are given \(--gpus\)"):
        wall_seconds(puzzle(a=(8, "")), {"a": 1}, 4)
