"""Estimates against arithmetic by hand, fits against times that were made up from known constants, schedules against small puzzles."""

import csv
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.cli import cost
from llmfusion.cli import estimate as plan
from llmfusion.reporting.measured import measured, refined, seconds_of
from llmfusion.reporting.schedule import wall_seconds
from llmfusion.study.graph import output_of
from llmfusion.study.snakemake import checked
from llmfusion.study.workload import Assumptions, Work, Workload, assumed_seconds
from tests.unit.mini_study import small

PAPER = ROOT / "config/config.yaml"


def study(folder: Path, name: str = "study", change: Any = lambda data: None) -> Path:
    """The small study with its results below ``folder``."""
    data = small()
    data["directory"] = str(folder / name)
    change(data)
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(data))
    return file


def workload(file: Path, **assumed: float) -> Workload:
    return Workload(*checked(file), Assumptions(**assumed))


def finish(work: Workload, seconds: Any, noise: float = 0.0) -> None:
    """Put manifests and benchmark files as if every job had been run, and had taken ``seconds(job)``."""
    draw = random.Random(0)
    for address, job in work.jobs.items():
        output = work.directory / output_of(address)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("{}")
        took = seconds(job) * (1 + noise * draw.uniform(-1, 1))
        note = (
            output.with_name("provenance.json")
            if output.name == "manifest.json"
            else output.with_suffix(".provenance.json")
        )
        note.write_text(
            json.dumps(
                {"start_seconds": 4 if job.step in ("pretrain", "train", "capture", "generate", "answer") else None}
            )
        )
        bench = work.directory / f"logs/benchmarks/{address}.tsv"
        bench.parent.mkdir(parents=True, exist_ok=True)
        bench.write_text(f"s\th:m:s\tmax_rss\tmax_vms\n{took:.4f}\t0:00:01\t512.5\t-\n")


# --------------------------------------------------------------------------------------------------------------- arithmetic
def test_the_papers_arithmetic_comes_out() -> None:
    """55 M tokens an epoch: 9.3 GPU-hours for SFT of 8B over 5 epochs at 40 % of an H100, 0.62 for a teacher's pass."""
    work = workload(PAPER)
    rates = assumed_seconds(work.assumed)
    hours = {
        address: seconds_of(job.work, rates[job.step]) * (job.gpus or 1) / 3600 for address, job in work.jobs.items()
    }
    assert hours["models/trained/sft"] == pytest.approx(9.3, abs=0.05)
    assert hours["teachers/base/code-llama-3-8b/infifusion"] == pytest.approx(0.62, abs=0.01)
    assert hours["models/trained/udf-all"] == pytest.approx(9.3 * (1 + 2 * 0.09 + 2 * 0.2), rel=0.01)
    sft = work.jobs["models/trained/sft"]
    assert (
        16e9 < sft.memory < 80e9
    )  # weights, gradients and two moments in float32 are 128 GB, an eighth of them in each GPU
    assert sft.disk == 2 * 8e9
    assert work.jobs["models/trained/kd-code-llama-3-8b"].disk == 4 * 8e9  # a merge's parent
    assert work.jobs["teachers/base/code-llama-3-8b/infifusion"].disk == pytest.approx(
        110_500 * 500 * 0.6 * 2 * 4400, rel=0.05
    )
    assert work.parameters("base/qwen2.5-math-7b-instruct") == 7e9  # the name tells
    assert work.parameters("base/deepseek-coder-v2-lite-instruct") == 8e9  # nothing tells: assumed


def test_processes_share_the_time_but_not_the_memory(tmp_path: Path) -> None:
    one = workload(study(tmp_path, "one")).jobs["models/trained/sft"]
    two = workload(study(tmp_path, "two", lambda d: d["models"]["trained"]["sft"].update(processes=2))).jobs[
        "models/trained/sft"
    ]
    assert (one.gpus, two.gpus) == (1, 2)
    assert two.work[1] == one.work[1] / 2
    assert two.memory > one.memory / 2


def test_sharding_shares_the_memory_and_less_is_kept_or_held_on_request(tmp_path: Path) -> None:
    def memory(**changed: Any) -> float:
        def change(data: dict[str, Any]) -> None:
            data["models"]["trained"]["sft"].update(changed)

        return (
            workload(study(tmp_path, "-".join(map(str, changed)) or "as-it-is", change))
            .jobs["models/trained/sft"]
            .memory
        )

    whole, parts = memory(processes=4), memory(processes=4, sharding="full")
    parameters = workload(study(tmp_path)).parameters("trained/sft")
    assert whole - parts < 0.75 * 16 * parameters  # a quarter stays, and what is gathered
    assert parts < whole
    assert memory(parameters="bfloat16", lr=1e-3) == memory() - 4 * parameters  # moments stay float32
    assert memory(activation_checkpointing=True) < memory()
    assert memory(micro_batch_size=1) == memory(micro_batch_tokens=1) < memory()  # a sample at a time, however long


def test_shards_share_a_teachers_pass_and_its_disk(tmp_path: Path) -> None:
    def of(shards: int) -> tuple[dict[str, Work], Workload]:
        work = workload(study(tmp_path, f"s{shards}", lambda d: d["capture"].update(shards=shards)))
        return {a: job for a, job in work.jobs.items() if a.startswith("teachers/")}, work

    one, (four, work) = of(1)[0], of(4)
    for address, job in one.items():
        shards = [j for a, j in four.items() if a.startswith(address.replace("teachers/", "teachers/shards/") + "/")]
        assert len(shards) == 4
        assert sum(s.work[1] for s in shards) == pytest.approx(job.work[1])
        assert sum(s.disk for s in shards) + four[address].disk == pytest.approx(job.disk)
        assert (four[address].step, four[address].gpus, {s.gpus for s in shards}) == ("gather", 0, {1})
        assert set(four[address].needs) == {*job.needs, *(s.address for s in shards)}
        assert not any(work.made(s.address) for s in shards)
        (work.directory / output_of(address)).parent.mkdir(parents=True)
        (work.directory / output_of(address)).touch()
        assert all(work.made(s.address) for s in shards)  # its folder may be removed


@pytest.mark.parametrize(("kind", "row"), [("hidden", 2 * 4400 + 16), ("topk", 10 * 8 + 20), ("online", 16)])
def test_kinds_of_caches_take_what_their_rows_take(tmp_path: Path, kind: str, row: float) -> None:
    def change(data: dict[str, Any]) -> None:
        data["capture"] = {"kind": kind}
        for entry in data["models"]["base"].values():
            entry.clear()
            entry.update(kind="path", path="some-8b", vocabulary="one", license="mit")

    work = workload(study(tmp_path, kind, change), tokens_per_sample=100, response_share=0.5)
    job = work.jobs["teachers/base/code/student"]
    rows = work.samples("student") * 50
    head = 2 * 2 * work.rows_of_head("base/code") * work.width("base/code")
    assert work.width("base/code") == pytest.approx(4400, rel=0.01)
    assert job.disk == pytest.approx(rows * row + head, rel=1e-2)
    kd, sft = (work.jobs[f"models/trained/{name}"] for name in ("kd-code", "sft"))
    if kind == "online":  # a forward pass is a third of a step
        assert kd.work[1] == pytest.approx(sft.work[1] * 4 / 3)
        assert kd.memory - sft.memory > 2 * 8e9
        assert "models/base/code" in kd.needs
    else:
        assert kd.work[1] == pytest.approx(sft.work[1])


def test_twice_the_steps_and_half_the_items_are_twice_and_half_the_work(tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["models"]["trained"]["sft"]["steps"] *= 2
        data["tasks"]["mmlu"]["items"]["rows"] //= 2

    before, after = workload(study(tmp_path)).jobs, workload(study(tmp_path, "other", other)).jobs
    assert after["models/trained/sft"].work[1] == 2 * before["models/trained/sft"].work[1]
    assert after["scores/trained/sft/mmlu"].work[1] == before["scores/trained/sft/mmlu"].work[1] // 2


# ----------------------------------------------------------------------------------------------------- constants from jobs
def truth(job: Work) -> float:
    """A machine a million times slower than assumed, with starts of its own."""
    rates = assumed_seconds(Assumptions(start=4, light_start=1))
    return (
        rates[job.step][0]
        + sum(amount * rate for amount, rate in zip(job.work[1:], rates[job.step][1:], strict=True)) * 1e5
    )


def other_size(data: dict[str, Any]) -> None:
    for kind in ("base", "trained"):
        for run in data["models"][kind].values():
            run["steps"] *= 2
    for task in data["tasks"].values():
        task["items"]["rows"] //= 2


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_one_finished_study_predicts_another_size_within_30_percent(tmp_path: Path, noise: float) -> None:
    done = workload(study(tmp_path))
    finish(done, truth, noise)
    rates, counts = refined(assumed_seconds(done.assumed), done)
    assert counts["train"] == len(done.study.models.trained) + sum(
        e.kind == "scratch" for e in done.study.models.base.values()
    )
    asked = workload(study(tmp_path, "other", other_size))
    expected, found = (
        {a: of(job) for a, job in asked.jobs.items()}
        for of in (truth, lambda job: seconds_of(job.work, rates[job.step]))
    )
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.3)
    for step in ("train", "answer", "score"):
        mine = [a for a, job in asked.jobs.items() if job.step == step]
        assert sum(found[a] for a in mine) == pytest.approx(sum(expected[a] for a in mine), rel=0.3), step
    without = assumed_seconds(asked.assumed)
    assert sum(seconds_of(job.work, without[job.step]) for job in asked.jobs.values()) < 0.5 * sum(
        expected.values()
    )  # the test can fail


def test_what_was_not_measured_keeps_its_assumption(tmp_path: Path) -> None:
    work = workload(study(tmp_path))
    assert refined(assumed_seconds(work.assumed), work) == (assumed_seconds(work.assumed), {})
    assert measured(work.directory, "models/trained/sft") is None


def test_a_benchmark_without_memory_is_read(tmp_path: Path) -> None:
    file = tmp_path / "logs/benchmarks/scores/base/p/t.tsv"
    file.parent.mkdir(parents=True)
    file.write_text("s\th:m:s\tmax_rss\n0.5\t0:00:00\tNA\n")
    found = measured(tmp_path, "scores/base/p/t")
    assert found is not None
    assert (found.seconds, found.memory_mb, found.provenance) == (0.5, 0.0, {})


# ----------------------------------------------------------------------------------------------------------------- schedule
def puzzle(**jobs: tuple[int, str]) -> dict[str, Work]:
    return {name: Work(name, "train", tuple(needs), (1.0,), gpus, 0, 0, 0) for name, (gpus, needs) in jobs.items()}


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
    jobs: dict[str, Work], seconds: dict[str, float], gpus: int, wall: float
) -> None:
    assert wall_seconds(jobs, seconds, gpus) == wall


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a asks for 8 GPUs, 4 are given \(--gpus\)"):
        wall_seconds(puzzle(a=(8, "")), {"a": 1}, 4)


# --------------------------------------------------------------------------------------------------------------- the program
def test_the_plan_of_the_paper_is_told_in_two_seconds_without_torch() -> None:
    code = f"import sys; from llmfusion.cli.estimate import main; main([{str(PAPER)!r}, '--gpus', '8']); print('torch' in sys.modules)"
    began = time.process_time()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    table = {line.rsplit(maxsplit=6)[0].strip(): line.split()[-6:] for line in done.stdout.splitlines()[2:13] if line}
    assert table["trainings"][:2] == ["21", "0"]
    assert table["total"][0] == "366"
    assert "wall time on 8 GPUs" in done.stdout
    assert "mfu                     0.4" in done.stdout
    assert time.process_time() - began < 2


def test_a_model_too_large_for_a_gpu_is_told(capsys: pytest.CaptureFixture) -> None:
    plan.main([str(PAPER), "--assume", "parameters=7e10"])
    assert "GB in one GPU, 80 are assumed: see `sharding` in docs/cluster.md" in capsys.readouterr().out
    plan.main([str(PAPER)])
    assert "in one GPU" not in capsys.readouterr().out


def test_disk_that_will_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = study(tmp_path)
    assert plan.main([str(file)]) == 0
    assert "are free in" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    assert plan.main([str(file)]) == 1
    assert "free some, or set the study's 'directory' to a larger place; nothing was started" in capsys.readouterr().err


def test_what_is_made_needs_no_more_disk_and_no_more_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = study(tmp_path)
    finish(workload(file), truth)
    assert plan.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "still to do: 0.0 GPU-hours; wall time on 8 GPUs: 0.0 hours" in out
    assert "disk: 0 KiB are needed" in out
    assert "measured: " in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--assume", "mfuu=0.3"], "there is no assumption 'mfuu'; did you mean 'mfu'?"),
        (["--assume", "mfu=high"], "--assume mfu=high: expected mfu=NUMBER"),
        (["--assume", "mfu=-1"], "expected a number that is not negative"),
        (["--gpus", "0"], "--gpus"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], told: str) -> None:
    assert plan.main([str(study(tmp_path)), *words]) == 2
    assert told in capsys.readouterr().err


def test_an_assumption_that_is_given_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert plan.main([str(PAPER), "--assume", "mfu=0.2", "--measured-by", str(study(tmp_path))]) in (0, 1)
    out = capsys.readouterr().out
    assert "0.2" in out
    assert "(given)" in out
    assert float(next(line for line in out.splitlines() if line.startswith("trainings")).split()[3]) == pytest.approx(
        563, abs=3
    )


# --------------------------------------------------------------------------------------------------------- costs of the rows
@pytest.mark.parametrize("shards", [1, 3])
def test_rows_cost_what_the_jobs_behind_them_took(tmp_path: Path, shards: int) -> None:
    """Every job takes 36 s, so that hours are hundredths of jobs."""
    work = workload(study(tmp_path, change=lambda data: data["capture"].update(shards=shards)))
    finish(work, lambda job: 36.0)
    plan_of = checked(tmp_path / "study.yaml")[1].artifacts
    for address, entry in plan_of.items():
        path = work.directory / output_of(address)
        manifest = path.with_suffix(".json") if path.suffix == ".csv" else path
        inputs = [need for need in work.jobs[address].needs if need not in entry["shards"]]
        manifest.write_text(json.dumps({"inputs": dict.fromkeys(inputs, "0"), "spec": entry["spec"]}))
        if address.startswith("teachers/"):
            path.with_name("provenance.json").write_text(json.dumps({"shards": entry["shards"]}))
    shutil.rmtree(work.directory / "results/teachers/shards", ignore_errors=True)  # what they took is still known
    assert cost.main([str(work.directory / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 0
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
            sum(work.jobs[a].gpus for a in behind if work.jobs[a].step in cost.FUSION) / 100
        )
        caches = {a for a in behind if a.startswith("teachers/") and not a.startswith("teachers/shards/")}
        assert len(behind) > len(caches) * (shards + 1 if shards > 1 else 1)
        assert (row["peak_memory_mb"], row["not_measured"], row["device"]) == ("512", "0", "cpu")
    assert float(rows["merged/ta-homogeneous"]["fusion_gpu_hours"]) == pytest.approx(
        0.02 + 0.02 * shards
    )  # two trainings, two caches: a gathering job has no GPU
    (work.directory / "logs/benchmarks/models/trained/sft.tsv").unlink()
    assert cost.main([str(work.directory / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 0
    assert {row["model"]: row["not_measured"] for row in csv.DictReader((tmp_path / "cost.csv").open())}[
        "trained/sft"
    ] == "1"


def test_a_missing_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cost.main([str(tmp_path / "results/table2.csv"), "--out", str(tmp_path / "cost.csv")]) == 1
    assert f"{tmp_path}/results/table2.json: is missing or no manifest" in capsys.readouterr().err
    assert not (tmp_path / "cost.csv").exists()
