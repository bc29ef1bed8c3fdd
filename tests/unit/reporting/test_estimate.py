"""An estimate as lines of text, and the disk that Snakemake is asked to keep free."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.reporting.estimate import (
    STAGES,
    DiskNeed,
    Estimate,
    check_disk,
    estimate_of,
    require_disk,
    table_lines,
    unknown_lines,
)
from llmfusion.reporting.machine import assumptions_for, core_speed, on_a_core
from llmfusion.study.addresses import output_of
from llmfusion.study.kinds import all_kinds
from llmfusion.study.snakemake import addresses_of, load_study
from llmfusion.study.workload import Assumptions, assumed_seconds
from tests.unit.finished_jobs import finish, study_file, workload


def test_stages_are_listed_in_the_order_of_the_work() -> None:
    jobs = workload(ROOT / "config/config.yaml")
    lines = table_lines(Estimate(jobs, assumed_seconds(jobs.assumed)), 1.0, 8)
    names = [re.split(r"\s{2,}", line)[0] for line in lines]
    assert names[: len(STAGES) + 2] == ["stage", *STAGES, "total"]
    assert {kind.report_stage for kind in all_kinds().values()} == set(STAGES)


def snakemake_with(jobs: list[SimpleNamespace], local: bool = True, cores: int = 1) -> SimpleNamespace:
    dag = SimpleNamespace(needrun_jobs=lambda: jobs)
    return SimpleNamespace(is_main_process=True, dag=dag, local_exec=local, cores=cores, global_resources={})


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_a_disk_that_does_not_exist_yet_is_the_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 300)
    fits, message = check_disk(tmp_path / "a/b", DiskNeed(200.0, 90.0, 10.0, ()))
    assert fits
    assert message.endswith(f"0 KiB are free in {tmp_path}")
    fits, message = check_disk(tmp_path / "a/b", DiskNeed(200.0, 101.0, 0.0, ()))
    assert not fits
    assert message.endswith("free some, or set the study's 'directory' to a larger place")


@pytest.mark.parametrize(("planned", "free", "refused"), [(1, 10**12, False), (1, 10, True), (0, 10, False)])
def test_snakemake_starts_nothing_where_the_planned_jobs_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: int, free: int, refused: bool
) -> None:
    study = load_study(study_file(tmp_path))
    disk(monkeypatch, free)
    jobs = [SimpleNamespace(output=["results/models/trained/sft/manifest.json"])] * planned
    workflow = snakemake_with(jobs)
    if refused:
        with pytest.raises(SystemExit, match="nothing was started"):
            require_disk(workflow, study)
    else:
        require_disk(workflow, study)
    require_disk(SimpleNamespace(is_main_process=False), study)  # a job of it


def unknown_pivot(data: dict[str, Any]) -> None:
    """A pivot whose files are not here and whose name does not tell its size."""
    data["models"]["base"]["pivot"] = {"kind": "path", "path": "not-there", "vocabulary": "v", "license": "mit"}


@pytest.mark.parametrize("cores", [1, 3])
def test_estimate_and_refusal_count_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """By hand: all results, and resume states of as many trainings as run at once."""
    study = load_study(study_file(tmp_path))
    work = workload(tmp_path / "study.yaml")
    results = sum(job.disk for job in work.jobs.values())
    states = sorted((job.resume for job in work.jobs.values()), reverse=True)
    expected = results + sum(states[:cores])
    estimate, _ = estimate_of(study.study, study.graph, assumptions_for("miniature"))
    assert estimate.disk_need(estimate.trainings_at_once(cores)).total == expected
    jobs = [SimpleNamespace(output=[output_of(address)]) for address in work.jobs]
    disk(monkeypatch, int(expected) - 1)
    with pytest.raises(SystemExit, match="nothing was started"):
        require_disk(snakemake_with(jobs, cores=cores), study)
    disk(monkeypatch, int(expected) + 1)
    require_disk(snakemake_with(jobs, cores=cores), study)


def test_a_model_of_unknown_size_is_named_and_never_the_reason_of_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(study_file(tmp_path, change=unknown_pivot))
    estimate, _ = estimate_of(study.study, study.graph, assumptions_for("miniature"))
    need = estimate.disk_need(1)
    assert need.unknown == ("base/pivot",)
    assert 0 < need.total < 10**8
    line = unknown_lines(estimate)[0]
    assert line.startswith("size unknown: base/pivot: not-there")
    assert "give its entry a key `parameters`, or --assume parameters=N" in line
    disk(monkeypatch, 10**8)
    require_disk(snakemake_with([SimpleNamespace(output=[output_of(address)]) for address in estimate.jobs]), study)
    given = assumptions_for("miniature").parse(["parameters=8e9"])
    known = estimate_of(study.study, study.graph, given)[0].disk_need(1)
    assert (known.unknown, known.total > 10**10) == ((), True)


def test_two_small_models_in_folders_are_not_taken_for_models_of_8b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of 100 and 250 MB were refused for 531 GiB."""
    sizes = {"pivot": 25_000_000, "code": 63_000_000}
    for name, values in sizes.items():
        sparse_checkpoint(tmp_path / name, values)

    def change(data: dict[str, Any]) -> None:
        for name, entry in data["models"]["base"].items():
            folder = tmp_path / ("code" if name == "code" else "pivot")
            entry.clear()
            entry.update(kind="path", path=str(folder), vocabulary="v", license="mit")

    study = load_study(study_file(tmp_path, change=change))
    estimate, _ = estimate_of(study.study, study.graph, assumptions_for("small"))
    need = estimate.disk_need(1)
    trained = [job for job in estimate.jobs.values() if job.report_stage in ("trainings", "merges")]
    assert need.unknown == ()
    assert need.resume in (12 * sizes["pivot"], 24 * sizes["pivot"], 36 * sizes["pivot"])  # of one training
    assert need.results < 4 * sizes["pivot"] * len(trained) + 5e9
    assert estimate.jobs["models/base/code"].disk == 0  # a second name for what is there
    on_another_disk(monkeypatch, tmp_path / "code")
    work = workload(tmp_path / "study.yaml")
    assert work.jobs["models/base/code"].disk == pytest.approx(4 * sizes["code"], rel=1e-3)


def sparse_checkpoint(folder: Path, values: int) -> None:
    """A checkpoint folder of so many float32 values, as a file with a hole."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * values)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 1000}))


def on_another_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    stat = Path.stat

    def other(path: Path, **options: Any) -> Any:
        status = stat(path, **options)
        if path.parent != folder or path.suffix != ".safetensors":
            return status
        fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**{**fields, "st_dev": -1})

    monkeypatch.setattr(Path, "stat", other)


def test_what_no_asked_target_needs_is_not_counted(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        rows = data["tables"]["table2"]["rows"]
        data["tables"]["table2"]["rows"] = [row for row in rows if row["model"].startswith("base/")]

    file = study_file(tmp_path, change=change)
    study = load_study(file)
    bare = estimate_of(study.study, study.graph, Assumptions())[0]
    assert not [job for job in bare.jobs.values() if job.report_stage in ("trainings", "merges")]
    whole = estimate_of(study.study, study.graph, Assumptions(), addresses_of(study.graph, ["models"]))[0]
    assert "models/trained/sft" in whole.jobs
    assert not [job for job in whole.jobs.values() if job.report_stage == "scores"]


def test_targets_are_named_as_snakemake_names_them(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path))
    of = {
        target: addresses_of(study.graph, [target]) for target in ("tables", "results/cost.csv", "results/table2.csv")
    }
    assert list(of.values()) == [["tables/table2"]] * 3
    assert addresses_of(study.graph, ["results/table2.cost.csv"]) == ["tables/table2"]
    sft = "results/models/trained/sft/manifest.json"
    assert addresses_of(study.graph, [sft, "models/trained/sft"]) == ["models/trained/sft"] * 2
    with pytest.raises(
        ValueError, match=r"results/tabel2.csv: the study makes no such file; did you mean 'results/tab"
    ):
        addresses_of(study.graph, ["results/tabel2.csv"])


def test_what_is_made_again_lies_beside_its_old_copy_until_it_is_done(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    study = load_study(file)
    finish(workload(file))
    estimate, _ = estimate_of(study.study, study.graph, assumptions_for("miniature"))
    jobs = [estimate.jobs[f"models/trained/{name}"] for name in ("sft", "kd-code")]
    need = estimate.disk_need(1, [job.address for job in jobs])
    assert (need.results, need.drafts) == (0, max(job.disk for job in jobs))
    assert estimate.disk_need(2, [job.address for job in jobs]).drafts == sum(job.disk for job in jobs)
    assert estimate.disk_need(1).total == 0


def test_a_long_training_keeps_more_resume_states_than_a_short_one(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path))
    short, long = (
        estimate_of(study.study, study.graph, Assumptions().parse([f"peak={peak}"]))[0] for peak in (1e13, 1e6)
    )
    assert long.disk_need(1).resume == 3 * short.disk_need(1).resume


def test_a_training_of_several_processes_is_counted_without_a_number_of_gpus(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, change=lambda data: data["models"]["trained"]["sft"].update(processes=4)))
    estimate, _ = estimate_of(study.study, study.graph, on_a_core(1e9))
    assert estimate.devices == 4
    assert estimate.wall_hours(estimate.devices) > 0


def test_without_a_gpu_the_speed_is_that_of_this_machine_and_cores_are_shared(tmp_path: Path) -> None:
    assert core_speed() > 1e8
    study = load_study(study_file(tmp_path))
    estimate, _ = estimate_of(study.study, study.graph, on_a_core(1e9))
    seconds = sum(estimate.seconds[address] + 3 for address in estimate.left)
    assert estimate.wall_hours(1) == pytest.approx(seconds / 3600)
    page = "\n".join(table_lines(estimate, 1.0, 1))
    assert "one job at a time, without a GPU, at 1 GFLOP/s a core" in page
    assert "GPU-hours" not in page
