"""The plan of the studies the project ships, out of a fresh copy: no data, no GPU, no SLURM, no network."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import clone, cpu_seconds_of, environment, jobs, outputs, snakemake, study


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("fresh"))


def test_the_paper_study_is_planned_completely(fresh: Path) -> None:
    plan = snakemake(fresh, "-n", "results/table2.csv")
    assert jobs(plan) == {
        "stage_dataset": 10, "stage_tasks": 4, "mix_samples": 1, "stage_base": 5, "generate_answers": 4, "capture_teacher": 4,
        "train_model": 21, "merge_models": 12, "answer": 38 * 4, "score": 38 * 4, "table": 1,
    }  # fmt: skip
    assert sum(jobs(plan).values()) <= 450
    assert "results/table2.csv" in outputs(plan)


def test_planning_the_paper_study_takes_at_most_6_cpu_seconds(fresh: Path) -> None:
    assert cpu_seconds_of(lambda: snakemake(fresh, "-n", "results/table2.csv")) <= 6


def test_planning_imports_no_torch(fresh: Path) -> None:
    code = """
import sys
from snakemake.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print('torch' in sys.modules, 'llmfusion' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "-n", "results/table2.csv"],
        cwd=fresh,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "False True", done.stdout[-500:] + done.stderr[-2000:]


def test_the_slurm_profile_plans_the_same_jobs_without_slurm(fresh: Path) -> None:
    assert jobs(snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")) == jobs(
        snakemake(fresh, "-n", "results/table2.csv")
    )


def test_the_slurm_profile_asks_for_a_gpu_where_models_run(fresh: Path) -> None:
    plan = snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")
    wants = {
        (block.split(":")[0], found[1])
        for block in plan.split("\nrule ")[1:]
        if (found := re.search(r"\bgpu=([1-9]\d*)", block))
    }
    assert wants == {("generate_answers", "1"), ("capture_teacher", "1"), ("train_model", "8"), ("answer", "1")}


def test_planning_through_the_slurm_profile_takes_at_most_6_cpu_seconds(fresh: Path) -> None:
    assert cpu_seconds_of(lambda: snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")) <= 6


def test_gpus_are_those_of_the_study_and_minutes_reach_the_trainer(fresh: Path) -> None:
    def two(content: dict[str, Any]) -> None:
        content["models"]["trained"]["sft"]["processes"] = content["models"]["base"]["code"]["processes"] = 2

    study(fresh / "config/two.yaml", two)
    words = ("--profile", "slurm", "-n", "-p", "models", "--configfile", "config/two.yaml")
    asked = {}
    for block in snakemake(fresh, *words).split("\nrule ")[1:]:
        output, gpus = (
            re.search(r"output: results/(\S+)/manifest.json", block),
            re.search(r"resources: .*gpu=(\d+)", block),
        )
        minutes = re.search(r"--minutes (\d+) ", block)
        asked[output.group(1) if output else ""] = (gpus and gpus.group(1), minutes and minutes.group(1))
    assert asked["models/trained/sft"] == ("2", "1440")
    assert asked["models/trained/kd-code"] == ("1", "1440")
    assert asked["models/base/code"] == ("2", "240")
    assert asked["models/merged/ta-homogeneous"] == (None, None)


def test_shards_are_jobs_with_a_gpu_and_who_gathers_them_has_none(fresh: Path) -> None:
    study(fresh / "config/sharded.yaml", lambda content: content["capture"].update(shards=3), "config")
    plan = snakemake(fresh, "--profile", "slurm", "-n", "teachers", "--configfile", "config/sharded.yaml")
    assert {rule: jobs(plan)[rule] for rule in ("capture_shard", "capture_teacher")} == {
        "capture_shard": 12,
        "capture_teacher": 4,
    }
    asked: dict[str, set[bool]] = {}
    for block in plan.split("\nrule ")[1:]:
        asked.setdefault(block.split(":")[0], set()).add("gpu=1" in block)
    assert (asked["capture_shard"], asked["capture_teacher"]) == ({True}, {False})
    gathers = next(block for block in plan.split("\nrule ")[1:] if "output: results/teachers/base/" in block)
    assert gathers.split("output:")[0].count("-of-3/manifest.json") == 3


def test_a_run_that_the_disk_cannot_hold_is_refused_before_its_first_job(fresh: Path) -> None:
    def gigantic(content: dict[str, Any]) -> None:
        content["models"]["base"]["pivot"]["architecture"].update(
            hidden_size=2**19, intermediate_size=2**20, num_hidden_layers=500
        )

    study(fresh / "config/gigantic.yaml", gigantic)
    words = ("--cores", "1", "--configfile", "config/gigantic.yaml")
    told = snakemake(fresh, "results/models/base/pivot/manifest.json", *words, fails=True)
    assert re.search(
        r"disk: [\d,]+ GiB are needed \([\d,]+ GiB of results, [\d,]+ GiB of resume states\), .* are free in /.*; nothing was started",
        told,
    ), told
    assert "Traceback" not in told
    assert "rule stage_base" not in told
    snakemake(fresh, "-n", "results/models/base/pivot/manifest.json", *words)  # a plan needs no disk
    snakemake(fresh, "results/data/tasks/humaneval/manifest.json", *words)  # and what was not asked for is not counted
    again = snakemake(fresh, "results/data/tasks/humaneval/manifest.json", *words)
    assert "Nothing to be done" in again


def test_only_the_profile_retries_and_what_it_asks_for_grows_with_the_attempt(fresh: Path) -> None:
    profile = yaml.safe_load((fresh / "profiles/slurm/config.yaml").read_text())
    assert profile["retries"] == 2
    assert not any("retries" in file.read_text() for file in [fresh / "Snakefile", *(fresh / "rules").glob("*.smk")])
    asked = [profile["default-resources"], *profile["set-resources"].values()]
    assert all(value.endswith(" * attempt") for resources in asked for value in resources.values())
    assert all(set(resources) == {"mem_mb", "runtime"} for resources in asked)  # no account, partition, GPU model
    assert profile["slurm-array-jobs"] == "score"
    assert profile["jobs"] >= 152  # cells of the paper's table


def test_a_site_overlay_adds_account_and_partition_to_every_job(fresh: Path) -> None:
    plan = snakemake(
        fresh, "--profile", "slurm", "--workflow-profile", "profiles/site-example", "-n", "results/table2.csv"
    )
    blocks = [block for block in plan.split("\nrule ")[1:] if not block.startswith("table")]
    assert len(blocks) > 300
    assert all("slurm_account=my-account, slurm_partition=gpu" in block for block in blocks)
    [train] = [block for block in blocks if "output: results/models/trained/sft/" in block]
    assert "mem_mb=200000" in train
    assert "runtime=1440" in train


def test_the_miniature_study_is_planned_from_any_folder(fresh: Path, tmp_path: Path) -> None:
    here = jobs(snakemake(fresh, "--profile", "profiles/mini", "-n", "results/table2.csv"))
    there = jobs(
        snakemake(
            tmp_path,
            "-s",
            str(fresh / "Snakefile"),
            "--profile",
            str(fresh / "profiles/mini"),
            "-n",
            "results/table2.csv",
        )
    )
    assert here == there
    assert here["table"] == 1


def test_one_cell_needs_only_what_it_is_made_from(fresh: Path) -> None:
    plan = snakemake(fresh, "--profile", "slurm", "results/scores/merged/rsaf-homogeneous/gsm8k.json", "-f", "-n")
    assert {rule: jobs(plan)[rule] for rule in ("train_model", "merge_models", "answer", "score", "capture_teacher")} == {
        "train_model": 2, "merge_models": 1, "answer": 1, "score": 1, "capture_teacher": 2,
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["data", "teachers", "models", "scores", "tables"])
def test_stage_targets_are_planned(fresh: Path, stage: str) -> None:
    assert sum(jobs(snakemake(fresh, "--profile", "profiles/mini", "-n", stage)).values()) > 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "lr=1"], "a study is one file and complete in itself"),
        (["--directory", "elsewhere"], "a study names its own directory"),
        (["--configfile", "config/mini.yaml", "config/config.yaml"], "several --configfile"),
    ],
)
def test_ways_around_the_study_are_refused(fresh: Path, words: list[str], told: str) -> None:
    output = snakemake(fresh, "-n", "results/table2.csv", *words, fails=True)
    assert told in output
    assert "Traceback" not in output


def test_a_faulty_study_is_refused_by_a_dry_run_with_all_mistakes(fresh: Path) -> None:
    text, logs = (fresh / "config/mini.yaml").read_text(), set((fresh / "runs").rglob("*.log"))
    bad = fresh / "config/bad.yaml"
    bad.write_text(
        text.replace("target: kd", "target: kdd", 1).replace(
            "parents: *kd-homogeneous, method: ta", "parents: [trained/kd-cod, trained/kd-math], method: ta", 1
        )
    )
    output = snakemake(fresh, "-n", "results/table2.csv", "--configfile", "config/bad.yaml", fails=True)
    assert "2 mistakes" in output
    assert "did you mean 'kd'?" in output
    assert "did you mean 'trained/kd-code'?" in output
    assert "Traceback" not in output
    assert set((fresh / "runs").rglob("*.log")) == logs
