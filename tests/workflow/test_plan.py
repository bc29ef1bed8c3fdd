"""The plan of the studies the project ships, out of a fresh copy: no data, no GPU, no SLURM, no network."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmfusion.study.kinds import all_kinds
from tests.project import clone, cpu_seconds_of, environment, jobs, outputs, planned, snakemake, study


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("fresh"))


def test_the_paper_study_is_planned_completely(fresh: Path) -> None:
    plan = snakemake(fresh, "-n", "results/table2.csv")
    data = {"stage_dataset": 10, "stage_tasks": 4, "mix_samples": 1, "generate_answers": 4}
    models = {"stage_base": 5, "train_model": 21, "merge_models": 12}
    cells = {"answer": 38 * 4, "score": 38 * 4, "table": 1}
    assert jobs(plan) == data | models | cells | {"capture_teacher": 4}
    assert sum(jobs(plan).values()) <= 450
    assert "results/table2.csv" in outputs(plan)


def test_costs_of_a_table_ask_for_no_other_table(fresh: Path) -> None:
    def two_tables(content: dict[str, Any]) -> None:
        table = content["tables"]["table2"]
        of_bases = [row for row in table["rows"] if row["model"].startswith("base/")]
        content["tables"]["bases"] = {**table, "rows": of_bases, "reference": of_bases[0]["model"]}

    study(fresh / "config/two.yaml", two_tables)

    def planned_for(target: str) -> dict[str, int]:
        return jobs(snakemake(fresh, "-n", target, "--configfile", "config/two.yaml"))

    assert planned_for("results/bases.cost.csv") == planned_for("results/bases.csv") | {"cost": 1}
    assert "train_model" not in planned_for("results/bases.cost.csv")
    assert planned_for("results/cost.csv")["table"] == 2


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
    words = [sys.executable, "-c", code, "-n", "results/table2.csv"]
    done = subprocess.run(words, cwd=fresh, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False True", done.stdout[-500:] + done.stderr[-2000:]


def test_the_slurm_profile_plans_the_same_jobs_without_slurm(fresh: Path) -> None:
    through_the_profile = snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")
    assert jobs(through_the_profile) == jobs(snakemake(fresh, "-n", "results/table2.csv"))


def test_the_slurm_profile_asks_for_a_gpu_where_models_run(fresh: Path) -> None:
    plan = snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")
    gpus = {(rule, gpu[1]) for rule, block in planned(plan) if (gpu := re.search(r"\bgpu=([1-9]\d*)", block))}
    assert gpus == {("generate_answers", "1"), ("capture_teacher", "1"), ("train_model", "8"), ("answer", "1")}


def test_planning_through_the_slurm_profile_takes_at_most_6_cpu_seconds(fresh: Path) -> None:
    assert cpu_seconds_of(lambda: snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv")) <= 6


def test_gpus_are_those_of_the_study_and_minutes_reach_the_trainer(fresh: Path) -> None:
    def two(content: dict[str, Any]) -> None:
        content["models"]["trained"]["sft"]["processes"] = content["models"]["base"]["code"]["processes"] = 2

    study(fresh / "config/two.yaml", two)
    words = ("--profile", "slurm", "-n", "-p", "models", "--configfile", "config/two.yaml")
    asked_for = {}
    for _, block in planned(snakemake(fresh, *words)):
        patterns = (r"output: results/(\S+)/manifest.json", r"resources: .*gpu=(\d+)", r"--minutes (\d+) ")
        address, gpus, minutes = (match and match[1] for match in (re.search(pattern, block) for pattern in patterns))
        asked_for[address] = (gpus, minutes)
    assert asked_for["models/trained/sft"] == ("2", "60")
    assert asked_for["models/trained/kd-code"] == ("1", "60")
    assert asked_for["models/base/code"] == ("2", "60")
    assert asked_for["models/merged/ta-homogeneous"] == (None, None)


def test_what_jobs_ask_for_follows_from_the_size_of_their_models(fresh: Path) -> None:
    memory: dict[str, dict[str, int]] = {}
    for name in ("config", "mini"):
        plan = snakemake(fresh, "--profile", "slurm", "-n", "results/table2.csv", f"--configfile=config/{name}.yaml")
        memory[name] = {rule: int(re.findall(r"mem_mb=(\d+)", block)[0]) for rule, block in planned(plan)}
    assert max(memory["mini"].values()) <= 5000
    assert memory["config"]["train_model"] > 128_000 > memory["config"]["answer"] > 16_000 > memory["config"]["score"]


def test_a_sites_limit_and_a_users_own_request_hold(fresh: Path) -> None:
    words = ("--profile", "slurm", "-n", "models", "--set-resources", "train_model:runtime=2880")
    overlay = fresh / "profiles/my-site"
    overlay.mkdir()
    text = (fresh / "profiles/site-example/config.yaml").read_text()
    (overlay / "config.yaml").write_text(text.replace("max_runtime: 1440", "max_runtime: 90"))
    plan = snakemake(fresh, *words, "--workflow-profile", "profiles/my-site")
    runtimes = {rule: re.findall(r"\bruntime=(\d+)", block)[0] for rule, block in planned(plan)}
    assert (runtimes["train_model"], runtimes["capture_teacher"]) == ("2880", "90")
    wrong = ("--default-resources", "max_runtime=1d", "-n", "models")
    output = snakemake(fresh, "--profile", "slurm", *wrong, fails=True)
    assert "max_runtime" in output
    assert "expected minutes, a whole number" in output


def test_shards_are_jobs_with_a_gpu_and_the_job_that_assembles_them_has_none(fresh: Path) -> None:
    study(fresh / "config/sharded.yaml", lambda content: content["capture"].update(shards=3), "config")
    plan = snakemake(fresh, "--profile", "slurm", "-n", "teachers", "--configfile", "config/sharded.yaml")
    counts = jobs(plan)
    assert (counts["capture_shard"], counts["capture_teacher"]) == (12, 4)
    with_gpu: dict[str, set[bool]] = {}
    for rule, block in planned(plan):
        with_gpu.setdefault(rule, set()).add("gpu=1" in block)
    assert (with_gpu["capture_shard"], with_gpu["capture_teacher"]) == ({True}, {False})
    assembles = next(block for _, block in planned(plan) if "output: results/teachers/base/" in block)
    assert assembles.split("output:")[0].count("-of-3/manifest.json") == 3


def test_a_run_that_the_disk_cannot_hold_is_refused_before_its_first_job(fresh: Path) -> None:
    def gigantic(content: dict[str, Any]) -> None:
        shape = content["models"]["base"]["pivot"]["architecture"]
        shape.update(hidden_size=2**19, intermediate_size=2**20, num_hidden_layers=500)

    study(fresh / "config/gigantic.yaml", gigantic)
    words = ("--cores", "1", "--configfile", "config/gigantic.yaml")
    output = snakemake(fresh, "results/models/base/pivot/manifest.json", *words, fails=True)
    needed = r"disk: [\d,]+ GiB are needed \([\d,]+ GiB of results, [\d,]+ GiB of resume states\)"
    assert re.search(rf"{needed}, .* are free in /.*; nothing was started", output), output
    assert "Traceback" not in output
    assert "rule stage_base" not in output
    snakemake(fresh, "-n", "results/models/base/pivot/manifest.json", *words)  # a plan needs no disk
    snakemake(fresh, "results/data/tasks/humaneval/manifest.json", *words)  # and what was not asked for is not counted
    again = snakemake(fresh, "results/data/tasks/humaneval/manifest.json", *words)
    assert "Nothing to be done" in again


def test_only_the_profile_retries_and_it_names_no_site(fresh: Path) -> None:
    profile = yaml.safe_load((fresh / "profiles/slurm/config.yaml").read_text())
    assert profile["retries"] == 2
    assert not any("retries" in file.read_text() for file in [fresh / "Snakefile", *(fresh / "rules").glob("*.smk")])
    assert set(profile["default-resources"]) == {"mem_mb", "runtime", "max_runtime"}  # no account, partition, GPU model
    assert profile["slurm-pass-command-as-script"]
    assert "slurm-array-jobs" not in profile  # the plugin's arrays do not work with it
    assert profile["jobs"] >= 152  # cells of the paper's table


def test_what_every_command_needs_stands_in_every_profile_that_may_be_the_only_one(fresh: Path) -> None:
    """Snakemake reads profiles/default by itself, unless an overlay is named."""
    read = {name: yaml.safe_load((fresh / f"profiles/{name}/config.yaml").read_text()) for name in ("default", "slurm")}
    assert read["default"].items() <= read["slurm"].items()
    assert read["default"]["show-failed-logs"]


def test_the_slurm_profile_names_every_rule_that_is_submitted_and_no_other(fresh: Path) -> None:
    profile = yaml.safe_load((fresh / "profiles/slurm/config.yaml").read_text())
    submitted = {name for name, kind in all_kinds().items() if not kind.is_local}
    assert set(profile["set-threads"]) == submitted - {"stage_tasks", "stage_dataset"}  # for which one core is enough


def test_a_site_overlay_adds_account_and_partition_to_every_job(fresh: Path) -> None:
    words = ("--profile", "slurm", "--workflow-profile", "profiles/site-example", "-n")
    plan = snakemake(fresh, *words, "results/table2.csv")
    blocks = [block for rule, block in planned(plan) if rule != "table"]
    assert len(blocks) > 300
    assert all("slurm_account=my-account, slurm_partition=gpu" in block for block in blocks)
    [train] = [block for block in blocks if "output: results/models/trained/sft/" in block]
    assert int(re.findall(r"mem_mb=(\d+)", train)[0]) > 128_000
    assert "max_runtime=1440" in train


def test_the_miniature_study_is_planned_from_any_folder(fresh: Path, tmp_path: Path) -> None:
    here = jobs(snakemake(fresh, "--profile", "profiles/mini", "-n", "results/table2.csv"))
    words = ("-s", str(fresh / "Snakefile"), "--profile", str(fresh / "profiles/mini"), "-n", "results/table2.csv")
    there = jobs(snakemake(tmp_path, *words))
    assert here == there
    assert here["table"] == 1


def test_one_cell_needs_only_what_it_is_made_from(fresh: Path) -> None:
    plan = snakemake(fresh, "--profile", "slurm", "results/scores/merged/rsaf-homogeneous/gsm8k.json", "-f", "-n")
    expected = {"train_model": 2, "merge_models": 1, "answer": 1, "score": 1, "capture_teacher": 2}
    assert expected.items() <= jobs(plan).items()


@pytest.mark.parametrize("stage", sorted({kind.stage for kind in all_kinds().values()} - {None}))
def test_stage_targets_are_planned(fresh: Path, stage: str) -> None:
    assert sum(jobs(snakemake(fresh, "--profile", "profiles/mini", "-n", stage)).values()) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "lr=1"], "a study is one file and complete in itself"),
        (["--directory", "elsewhere"], "a study names its own directory"),
        (["--configfile", "config/mini.yaml", "config/config.yaml"], "several --configfile"),
        (["--configfile", "config/mini.yaml", "config/schema.json"], "or write --configfile=config/mini.yaml"),
    ],
)
def test_ways_around_the_study_are_refused(fresh: Path, words: list[str], message: str) -> None:
    output = snakemake(fresh, "-n", "results/table2.csv", *words, fails=True)
    assert message in output
    assert "Traceback" not in output


def test_a_target_may_follow_a_configfile_that_is_named_with_an_equals_sign(fresh: Path) -> None:
    """With a space, Snakemake takes the target for a second configfile, before it reads the Snakefile."""
    assert jobs(snakemake(fresh, "-n", "--configfile=config/mini.yaml", "results/table2.csv"))["table"] == 1


def test_a_faulty_study_is_refused_by_a_dry_run_with_all_mistakes(fresh: Path) -> None:
    logs = set((fresh / "runs").rglob("*.log"))
    text = (fresh / "config/mini.yaml").read_text().replace("target: kd", "target: kdd", 1)
    parents = ("parents: *kd-homogeneous, method: ta", "parents: [trained/kd-cod, trained/kd-math], method: ta")
    (fresh / "config/bad.yaml").write_text(text.replace(*parents, 1))
    output = snakemake(fresh, "-n", "results/table2.csv", "--configfile", "config/bad.yaml", fails=True)
    assert "2 mistakes" in output
    assert "did you mean 'kd'?" in output
    assert "did you mean 'trained/kd-code'?" in output
    assert "Traceback" not in output
    assert set((fresh / "runs").rglob("*.log")) == logs


@pytest.mark.parametrize("resources", [[], ["--resources", "gpu=1"]])
def test_what_cannot_fit_the_disk_is_refused_before_the_first_job(fresh: Path, resources: list[str]) -> None:
    def too_large(content: dict[str, Any]) -> None:
        content["directory"] = "runs/too-large"
        huge = {"kind": "hub", "repo": "nobody/huge-900000b", "revision": "0" * 40, "vocabulary": "v", "license": "mit"}
        content["models"]["base"]["pivot"] = huge

    study(fresh / "config/too-large.yaml", too_large)
    start = ["--configfile", "config/too-large.yaml", "--cores", "1", *resources]
    output = snakemake(fresh, "results/models/base/pivot/manifest.json", *start, fails=True)
    assert "disk: 1,676,381 GiB are needed" in output
    assert "nothing was started" in output
    assert "Traceback" not in output
    snakemake(fresh, "results/data/dataset/text-facts/manifest.json", *start)  # what fits is made
