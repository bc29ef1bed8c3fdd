"""The plan of the studies the project ships, out of a fresh copy: no data, no GPU, no SLURM, no network."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import clone, cpu_seconds_of, environment, jobs, outputs, snakemake


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
    done = subprocess.run([sys.executable, "-c", code, "-n", "results/table2.csv"], cwd=fresh, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False True", done.stdout[-500:] + done.stderr[-2000:]


def test_the_slurm_profile_plans_the_same_jobs_without_slurm(fresh: Path) -> None:
    assert jobs(snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")) == jobs(snakemake(fresh, "-n", "results/table2.csv"))


def test_the_slurm_profile_asks_for_a_gpu_where_models_run(fresh: Path) -> None:
    plan = snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")
    wants = {block.split(":")[0] for block in plan.split("\nrule ")[1:] if "gpu=1" in block}
    assert wants == {"generate_answers", "capture_teacher", "train_model", "answer"}


def test_the_miniature_study_is_planned_from_any_folder(fresh: Path, tmp_path: Path) -> None:
    here = jobs(snakemake(fresh, "--profile", "profiles/mini", "-n", "results/table2.csv"))
    there = jobs(snakemake(tmp_path, "-s", str(fresh / "Snakefile"), "--profile", str(fresh / "profiles/mini"), "-n", "results/table2.csv"))
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
    text = (fresh / "config/mini.yaml").read_text()
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
    assert not (fresh / "runs").exists() or not any((fresh / "runs").rglob("*.log"))
