"""Costs of real runs: what the rows took, and a plan for another size made from one that was run."""

import csv
from pathlib import Path
from typing import Any

import pytest

from llmfusion.reporting.measured import fit_coefficients, read_measurement
from llmfusion.study.snakemake import checked
from llmfusion.study.workload import Assumptions, Workload, assumed_seconds, seconds_of
from tests.e2e.conftest import COST, PROFILE, ROWS, TARGET, Project, tiny
from tests.project import llmfusion, snakemake, study


def test_every_row_states_what_it_took(made: Path) -> None:
    rows = {row["model"]: row for row in csv.DictReader((made / "runs/tiny" / COST).open())}
    assert list(rows) == list(ROWS)
    for row in rows.values():
        assert row["not_measured"] == "0"
        assert 0 < float(row["chain_hours"]) <= float(row["job_hours"])
        assert float(row["peak_memory_mb"]) > 100  # torch was loaded
    fusion = {model: float(row["fusion_gpu_hours"]) for model, row in rows.items()}
    assert fusion["base/pivot"] == 0
    parents = fusion["trained/kd-code"] + fusion["trained/sft"]
    assert fusion["merged/ta-homogeneous"] == pytest.approx(parents, abs=2e-6)  # written with six decimals
    assert fusion["trained/kd-code"] > 0


def test_a_finished_study_is_planned_from_what_it_took(made: Path) -> None:
    done = llmfusion(made, "estimate", "config/tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "measured: " in done.stdout
    assert "train (" in done.stdout


@pytest.mark.long
def test_one_study_predicts_twice_the_steps_and_half_the_items_within_30_percent(made: Path, project: Project) -> None:
    def other(content: dict[str, Any]) -> None:
        tiny(content)
        for run in [*content["models"]["base"].values(), *content["models"]["trained"].values()]:
            run["steps"] *= 2
        for task in content["tasks"].values():
            task["items"]["rows"] //= 2

    folder = project("other-size")
    study(folder / "config/tiny.yaml", other)
    snakemake(folder, *PROFILE, "--cores", "2", TARGET)
    known, planned = (Workload(*checked_in(place), Assumptions()) for place in (made, folder))
    rates, _ = fit_coefficients(assumed_seconds(Assumptions()), known)
    jobs = {address: read_measurement(planned.directory, address) for address in planned.jobs}
    seconds = {address: job.seconds for address, job in jobs.items() if job is not None}
    assert set(seconds) >= {address for address, job in planned.jobs.items() if job.rates == "train"}
    expected = sum(seconds_of(planned.jobs[address].work, rates[planned.jobs[address].rates]) for address in seconds)
    assert expected == pytest.approx(sum(seconds.values()), rel=0.3)


def checked_in(folder: Path) -> Any:
    """A copy's study, with its directory where the copy is."""
    file = folder / "config/absolute.yaml"
    text = (folder / "config/tiny.yaml").read_text()
    file.write_text(text.replace("directory: runs/tiny", f"directory: {folder}/runs/tiny"))
    return checked(file)
