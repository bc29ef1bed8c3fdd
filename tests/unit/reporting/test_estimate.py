"""An estimate as lines of text, and the disk that Snakemake is asked to keep free."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmfusion import ROOT
from llmfusion.reporting.estimate import STAGES, Estimate, check_disk, require_disk, table_lines
from llmfusion.study.kinds import all_kinds
from llmfusion.study.snakemake import load_study
from llmfusion.study.workload import assumed_seconds
from tests.unit.finished_jobs import study_file, workload


def test_stages_are_listed_in_the_order_of_the_work() -> None:
    jobs = workload(ROOT / "config/config.yaml")
    lines = table_lines(Estimate(jobs, assumed_seconds(jobs.assumed)), 1.0, 8)
    names = [re.split(r"\s{2,}", line)[0] for line in lines]
    assert names[: len(STAGES) + 2] == ["stage", *STAGES, "total"]
    assert {kind.report_stage for kind in all_kinds().values()} == set(STAGES)


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_a_disk_that_does_not_exist_yet_is_the_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 300)
    fits, message = check_disk(tmp_path / "a/b", 200.0, 100.0)
    assert fits
    assert message.endswith(f"0 KiB are free in {tmp_path}")
    fits, message = check_disk(tmp_path / "a/b", 200.0, 101.0)
    assert not fits
    assert message.endswith("free some, or set the study's 'directory' to a larger place")


@pytest.mark.parametrize(("planned", "free", "refused"), [(1, 10**12, False), (1, 10, True), (0, 10, False)])
def test_snakemake_starts_nothing_where_the_planned_jobs_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: int, free: int, refused: bool
) -> None:
    study = load_study(study_file(tmp_path))
    disk(monkeypatch, free)
    jobs = [SimpleNamespace(output=["results/models/trained/sft/manifest.json"])] * planned
    workflow = SimpleNamespace(is_main_process=True, dag=SimpleNamespace(needrun_jobs=lambda: jobs))
    if refused:
        with pytest.raises(SystemExit, match="nothing was started"):
            require_disk(workflow, study)
    else:
        require_disk(workflow, study)
    require_disk(SimpleNamespace(is_main_process=False), study)  # a job of it
