"""What rows of a table took, from manifests and provenance."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from llmfusion.cli.main import main
from llmfusion.reporting.costs import COLUMNS, costs_csv
from llmfusion.study.addresses import output_of
from llmfusion.study.snakemake import checked
from tests.unit.finished_jobs import finish, study_file, workload

FUSION = ("capture", "assemble", "generate", "train")  # rates of jobs that `fusion_gpu_hours` counts


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_cost_what_the_jobs_behind_them_took(tmp_path: Path, shards: int) -> None:
    """Every job takes 36 s, so that hours are hundredths of jobs."""
    work = workload(study_file(tmp_path, change=lambda data: data["capture"].update(shards=shards)))
    finish(work, lambda job: 36.0)
    artifacts = checked(tmp_path / "study.yaml")[1].artifacts
    for address, entry in artifacts.items():
        path = work.directory / output_of(address)
        manifest = path.with_suffix(".json") if path.suffix == ".csv" else path
        inputs = [need for need in work.jobs[address].needs if need not in entry.shards]
        manifest.write_text(json.dumps({"inputs": dict.fromkeys(inputs, "0"), "spec": entry.spec}))
        if address.startswith("teachers/"):
            took = {"seconds": 36.0, "memory_mb": 512}
            record = {**took, "shards": dict.fromkeys(entry.shards, took)}
            path.with_name("provenance.json").write_text(json.dumps(record))
    shutil.rmtree(work.directory / "results/teachers/shards", ignore_errors=True)  # what they took is still known
    assert main(["cost", str(work.directory / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 0
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "cost.csv").open())}
    assert list(rows) == [row.model for row in work.study.tables["table2"].rows]
    for row in rows.values():
        behind, todo = set(), [f"scores/{row['model']}/{task}" for task in work.study.tables["table2"].tasks]
        while todo:
            if (address := todo.pop()) not in behind:
                behind.add(address)
                todo += work.jobs[address].needs
        assert int(row["jobs"]) == len(behind)
        assert float(row["job_hours"]) == pytest.approx(len(behind) / 100)
        assert float(row["gpu_hours"]) == pytest.approx(sum(work.jobs[a].gpus for a in behind) / 100)
        assert float(row["fusion_gpu_hours"]) == pytest.approx(
            sum(work.jobs[a].gpus for a in behind if work.jobs[a].rates in FUSION) / 100
        )
        caches = {a for a in behind if a.startswith("teachers/") and not a.startswith("teachers/shards/")}
        assert len(behind) > len(caches) * (shards + 1 if shards > 1 else 1)
        assert (row["peak_memory_mb"], row["not_measured"], row["device"]) == ("512", "0", "cpu")
    assert float(rows["merged/ta-homogeneous"]["fusion_gpu_hours"]) == pytest.approx(
        0.02 + 0.02 * shards
    )  # two trainings, two caches: a gathering job has no GPU
    (work.directory / "results/models/trained/sft/provenance.json").unlink()
    assert main(["cost", str(work.directory / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 0
    assert {row["model"]: row["not_measured"] for row in csv.DictReader((tmp_path / "cost.csv").open())}[
        "trained/sft"
    ] == "1"


def test_a_missing_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["cost", str(tmp_path / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 1
    assert f"{tmp_path}/results/table2.json: is missing or no manifest" in capsys.readouterr().err
    assert not (tmp_path / "cost.csv").exists()


def test_the_file_has_its_columns_in_order_and_quotes_what_must_be() -> None:
    row = {name: name for name in COLUMNS} | {"label": 'a, "b"', "jobs": 5, "peak_gpu_memory_mb": "", "not_measured": 0}
    values = ["table", "category", '"a, ""b"""', "model", "5", *COLUMNS[5:10], "", "device", "0"]
    assert costs_csv([row]) == f"{','.join(COLUMNS)}\n{','.join(values)}\n"
    mixed = costs_csv([row, row | {"peak_gpu_memory_mb": 512}]).splitlines()
    assert [line.split(",")[-3] for line in mixed[1:]] == ["", "512"]
