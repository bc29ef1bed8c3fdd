"""The workflow run for real: every rule, again, elsewhere, changed, and from one cell."""

import csv
import json
from pathlib import Path

import yaml

from llmfusion.study.kinds import all_kinds
from tests.e2e.conftest import PROFILE, ROWS, TARGET, Project
from tests.project import BIN, SECRETS, jobs, llmfusion, outputs, results, snakemake


def test_every_rule_is_executed(made: Path) -> None:
    assert set(jobs((made / "run.log").read_text())) == {*all_kinds(), "cost"}


def test_the_table_has_its_rows_and_says_that_it_is_miniature(made: Path) -> None:
    rows = list(csv.DictReader((made / "runs/tiny/results/table2.csv").open()))
    assert [row["model"] for row in rows] == list(ROWS)
    for row in rows:
        assert row["scale"] == "miniature"
        assert abs(float(row["mmlu"]) - 100 * int(row["mmlu_k"]) / int(row["mmlu_n"])) < 0.005
        assert abs(float(row["average"]) - (float(row["mmlu"]) + float(row["humaneval"])) / 2) < 0.011
    assert "not comparable" in (made / "runs/tiny/results/table2.md").read_text()


def test_a_second_run_has_nothing_to_do(made: Path) -> None:
    assert "Nothing to be done" in snakemake(made, *PROFILE, TARGET)


def test_touching_every_file_re_runs_nothing(made: Path) -> None:
    for path in [*(made / "runs/tiny").rglob("*"), *(made / "src").rglob("*.py"), *(made / "config").glob("*")]:
        if path.is_file() and ".snakemake" not in path.parts:
            path.touch()
    assert "Nothing to be done" in snakemake(made, *PROFILE, TARGET)


def test_a_changed_learning_rate_re_plans_exactly_its_descendants(made: Path) -> None:
    content = yaml.safe_load((made / "config/tiny.yaml").read_text())
    content["models"]["trained"]["kd-code"]["lr"] = 0.003
    changed = made / "config/changed.yaml"
    changed.write_text(yaml.safe_dump(content))
    plan = snakemake(made, "-n", "--cores", "2", TARGET, "--configfile", str(changed))
    models = ("trained/kd-code", "merged/ta-homogeneous")
    expected = {f"results/{kind}/manifest.json" for m in models for kind in (f"models/{m}", f"answers/{m}/all")}
    expected |= {f"results/scores/{m}/{task}.json" for m in models for task in ("mmlu", "humaneval")} | {TARGET}
    assert outputs(plan) == expected


def test_another_number_of_shards_re_plans_nothing_also_without_their_folders(made: Path) -> None:
    content = yaml.safe_load((made / "config/tiny.yaml").read_text())
    shards = made / "runs/tiny/results/teachers/shards"
    assert {p.name for p in shards.glob("base/code/student/*")} == {"1-of-2", "2-of-2"}
    cache = made / "runs/tiny/results/teachers/base/code/student"
    assert all(p.stat().st_nlink == 2 for p in [*cache.glob("piece-*.safetensors"), cache / "head.safetensors"])
    for count in (1, 5):
        content["capture"]["shards"] = count
        changed = made / f"config/shards-{count}.yaml"
        changed.write_text(yaml.safe_dump(content))
        plan = ("-n", "--cores", "2", TARGET, "teachers", "--configfile", str(changed))
        assert "Nothing to be done" in snakemake(made, *plan)
    shards.rename(aside := shards.with_name("aside"))
    try:
        assert "Nothing to be done" in snakemake(made, *plan)
    finally:
        aside.rename(shards)


def test_one_cell_again_is_one_job_with_the_same_result(made: Path) -> None:
    cell = "results/scores/merged/ta-homogeneous/humaneval.json"
    before = results(made)
    assert jobs(snakemake(made, *PROFILE, cell, "-f")) == {"score": 1}
    assert results(made) == before


def test_another_copy_one_job_at_a_time_gives_the_same_bytes(made: Path, project: Project) -> None:
    other = project("other")
    snakemake(other, *PROFILE, "--cores", "1", TARGET)
    mine, theirs = results(made), results(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_results_name_no_place_on_this_machine(made: Path) -> None:
    for name, content in results(made).items():
        assert str(made).encode() not in content, name
        assert str(BIN).encode() not in content, name


def test_secrets_of_the_environment_stand_in_no_result_log_or_record(made: Path) -> None:
    files = [p for p in made.rglob("*") if p.is_file() and not p.is_relative_to(made / "tests")]
    assert {"results", "logs", ".snakemake"} <= {
        p.relative_to(made / "runs/tiny").parts[0] for p in files if p.is_relative_to(made / "runs/tiny")
    }
    for path in files:
        content = path.read_bytes()
        assert [name for name, value in SECRETS.items() if value.encode() in content] == [], path


def test_every_cell_says_how_it_was_asked(made: Path) -> None:
    cell = json.loads((made / "runs/tiny/results/scores/base/code/humaneval.json").read_text())["facts"]
    assert cell["asked"]["format"] == "code"
    assert cell["asked"]["decoding"] == "greedy"
    assert cell["k"] == cell["right"].count("1")
    assert cell["n"] == 24 == sum(cell["reasons"].values())


def test_answers_are_asked_again_for_one_cell_alone(made: Path) -> None:
    plan = snakemake(made, *PROFILE, "results/scores/merged/ta-homogeneous/humaneval.json", "-R", "answer", "-n")
    assert outputs(plan) >= {
        "results/answers/merged/ta-homogeneous/all/manifest.json",
        "results/scores/merged/ta-homogeneous/humaneval.json",
    }
    assert set(jobs(plan)) == {"answer", "score"}


def test_checkpoints_are_merged_by_hand(made: Path, tmp_path: Path) -> None:
    models = made / "runs/tiny/results/models"
    parents = (str(models / name) for name in ("trained/sft", "trained/kd-code"))
    words = ["--method", "rsaf", "--pivot", str(models / "base/pivot"), "--models", *parents]
    done = llmfusion(tmp_path, "merge", *words, "--out", str(tmp_path / "merged"), "--set", "tau=0.1")
    assert done.returncode == 0, done.stderr
    pivot = json.loads((models / "base/pivot/config.json").read_text())
    assert json.loads((tmp_path / "merged/config.json").read_text()) == pivot
    report = list(csv.DictReader((tmp_path / "merged/merge_report.csv").open()))
    assert {row["tensor"] for row in report} >= {"model.norm.weight", "model.embed_tokens.weight"}
    right_skewed = [row for row in report if float(row["S_0"]) >= 0]
    assert all(0 < float(row["K_0"]) <= 0.1 / (1 + float(row["S_0"])) + 1e-12 for row in right_skewed)
