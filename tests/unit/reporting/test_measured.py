"""Fits against times that were made up from known constants."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.reporting.measured import fit_coefficients, read_measurement
from llmfusion.study.workload import assumed_seconds, seconds_of
from tests.unit.finished_jobs import finish, slow_seconds, study_file, workload


def other_size(data: dict[str, Any]) -> None:
    for kind in ("base", "trained"):
        for run in data["models"][kind].values():
            run["steps"] *= 2
    for task in data["tasks"].values():
        task["items"]["rows"] //= 2


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_one_finished_study_predicts_another_size_within_30_percent(tmp_path: Path, noise: float) -> None:
    done = workload(study_file(tmp_path))
    finish(done, noise=noise)
    rates, counts = fit_coefficients(assumed_seconds(done.assumed), done)
    assert counts["train"] == len(done.study.models.trained) + sum(
        e.kind == "scratch" for e in done.study.models.base.values()
    )
    planned = workload(study_file(tmp_path, "other", other_size))
    expected, found = (
        {a: of(job) for a, job in planned.jobs.items()}
        for of in (slow_seconds, lambda job: seconds_of(job.work, rates[job.rates]))
    )
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.3)
    for rates_name in ("train", "answer", "score"):
        own = [address for address, job in planned.jobs.items() if job.rates == rates_name]
        assert sum(found[a] for a in own) == pytest.approx(sum(expected[a] for a in own), rel=0.3), rates_name
    without = assumed_seconds(planned.assumed)
    assert sum(seconds_of(job.work, without[job.rates]) for job in planned.jobs.values()) < 0.5 * sum(
        expected.values()
    )  # the test can fail


def test_what_was_not_measured_keeps_its_assumption(tmp_path: Path) -> None:
    work = workload(study_file(tmp_path))
    assert fit_coefficients(assumed_seconds(work.assumed), work) == (assumed_seconds(work.assumed), {})
    assert read_measurement(work.directory, "models/trained/sft") is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"seconds": 0.5}, (0.5, 0.0)),
        ({"seconds": 2, "memory_mb": 512}, (2.0, 512.0)),
        ({"seconds": 2, "memory_mb": "NA"}, (2.0, 0.0)),
        ({"seconds": 0}, None),
        ({"seconds": True}, None),
        ({"seconds": "1"}, None),
        ({}, None),
    ],
)
def test_only_what_a_job_recorded_of_itself_is_a_measurement(
    tmp_path: Path, record: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    file = tmp_path / "results/scores/base/p/t.provenance.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record))
    took = read_measurement(tmp_path, "scores/base/p/t")
    assert (took and (took.seconds, took.memory_mb)) == expected
