"""The work of jobs against arithmetic by hand."""

import re
from pathlib import Path
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.study.addresses import output_of
from llmfusion.study.workload import Assumptions, JobWork, Workload, assumed_seconds, seconds_of
from tests.unit.finished_jobs import study_file, workload

PAPER = ROOT / "config/config.yaml"


def test_the_papers_arithmetic_comes_out() -> None:
    """55 M tokens an epoch: 9.3 GPU-hours for SFT of 8B over 5 epochs at 40 % of an H100, 0.62 for a teacher's pass."""
    work = workload(PAPER)
    rates = assumed_seconds(work.assumed)
    hours = {
        address: seconds_of(job.work, rates[job.rates]) * (job.gpus or 1) / 3600 for address, job in work.jobs.items()
    }
    assert hours["models/trained/sft"] == pytest.approx(9.3, abs=0.05)
    assert hours["teachers/base/code-llama-3-8b/infifusion"] == pytest.approx(0.62, abs=0.01)
    assert hours["models/trained/udf-all"] == pytest.approx(9.3 * (1 + 2 * 0.09 + 2 * 0.2), rel=0.01)
    sft = work.jobs["models/trained/sft"]
    assert (
        16e9 < sft.gpu_memory < 80e9
    )  # weights, gradients and two moments in float32 are 128 GB, an eighth of them in each GPU
    assert sft.disk == 2 * 8e9
    assert work.jobs["models/trained/kd-code-llama-3-8b"].disk == 4 * 8e9  # a merge's parent
    assert work.jobs["teachers/base/code-llama-3-8b/infifusion"].disk == pytest.approx(
        110_500 * 500 * 0.6 * 2 * 4400, rel=0.05
    )
    assert work.parameters("base/qwen2.5-math-7b-instruct") == 7e9  # the name tells
    deepseek = "base/deepseek-coder-v2-lite-instruct"  # its name does not tell, the study does
    assert (work.parameters(deepseek), work.active_parameters(deepseek)) == (15.7e9, pytest.approx(2.4e9))


def test_processes_share_the_time_but_not_the_memory(tmp_path: Path) -> None:
    one = workload(study_file(tmp_path, "one")).jobs["models/trained/sft"]
    two = workload(study_file(tmp_path, "two", lambda d: d["models"]["trained"]["sft"].update(processes=2))).jobs[
        "models/trained/sft"
    ]
    assert (one.gpus, two.gpus) == (1, 2)
    assert two.work[1] == one.work[1] / 2
    assert two.gpu_memory > one.gpu_memory / 2


def test_sharding_shares_the_memory_and_less_is_kept_or_held_on_request(tmp_path: Path) -> None:
    def memory(**changed: Any) -> float:
        def change(data: dict[str, Any]) -> None:
            data["models"]["trained"]["sft"].update(changed)

        return (
            workload(study_file(tmp_path, "-".join(map(str, changed)) or "as-it-is", change))
            .jobs["models/trained/sft"]
            .gpu_memory
        )

    whole, parts = memory(processes=4), memory(processes=4, sharding="full")
    parameters = workload(study_file(tmp_path)).parameters("trained/sft")
    assert whole - parts < 0.75 * 16 * parameters  # a quarter stays, and what is gathered
    assert parts < whole
    assert memory(parameters="bfloat16", lr=1e-3) == memory() - 4 * parameters  # moments stay float32
    assert memory(activation_checkpointing=True) < memory()
    assert memory(micro_batch_size=1) == memory(micro_batch_tokens=1) < memory()  # a sample at a time, however long


def test_shards_share_a_teachers_pass_and_its_disk(tmp_path: Path) -> None:
    def of(shards: int) -> tuple[dict[str, JobWork], Workload]:
        work = workload(study_file(tmp_path, f"s{shards}", lambda d: d["capture"].update(shards=shards)))
        return {a: job for a, job in work.jobs.items() if a.startswith("teachers/")}, work

    one, (four, work) = of(1)[0], of(4)
    for address, job in one.items():
        shards = [j for a, j in four.items() if a.startswith(address.replace("teachers/", "teachers/shards/") + "/")]
        assert len(shards) == 4
        assert sum(s.work[1] for s in shards) == pytest.approx(job.work[1])
        assert sum(s.disk for s in shards) + four[address].disk == pytest.approx(job.disk)
        assert (four[address].rates, four[address].gpus, {s.gpus for s in shards}) == ("assemble", 0, {1})
        assert set(four[address].needs) == {*job.needs, *(s.address for s in shards)}
        assert not any(work.is_made(s.address) for s in shards)
        (work.directory / output_of(address)).parent.mkdir(parents=True)
        (work.directory / output_of(address)).touch()
        assert all(work.is_made(s.address) for s in shards)  # its folder may be removed


@pytest.mark.parametrize(("kind", "row"), [("hidden", 2 * 4400 + 16), ("topk", 10 * 8 + 20), ("online", 16)])
def test_kinds_of_caches_take_what_their_rows_take(tmp_path: Path, kind: str, row: float) -> None:
    def change(data: dict[str, Any]) -> None:
        data["capture"] = {"kind": kind}
        for entry in data["models"]["base"].values():
            entry.clear()
            entry.update(kind="path", path="some-8b", vocabulary="one", license="mit")

    work = workload(study_file(tmp_path, kind, change), tokens_per_sample=100, response_share=0.5)
    job = work.jobs["teachers/base/code/student"]
    rows = work.samples("student") * 50
    head = 2 * 2 * work.vocabulary_size("base/code") * work.hidden_size("base/code")
    assert work.hidden_size("base/code") == pytest.approx(4400, rel=0.01)
    assert job.disk == pytest.approx(rows * row + head, rel=1e-2)
    kd, sft = (work.jobs[f"models/trained/{name}"] for name in ("kd-code", "sft"))
    if kind == "online":  # a forward pass is a third of a step
        assert kd.work[1] == pytest.approx(sft.work[1] * 4 / 3)
        assert kd.gpu_memory - sft.gpu_memory > 2 * 8e9
        assert "models/base/code" in kd.needs
    else:
        assert kd.work[1] == pytest.approx(sft.work[1])


def test_twice_the_steps_and_half_the_items_are_twice_and_half_the_work(tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["models"]["trained"]["sft"]["steps"] *= 2
        data["tasks"]["mmlu"]["items"]["rows"] //= 2

    before, after = workload(study_file(tmp_path)).jobs, workload(study_file(tmp_path, "other", other)).jobs
    assert after["models/trained/sft"].work[1] == 2 * before["models/trained/sft"].work[1]
    assert after["scores/trained/sft/mmlu"].work[1] == before["scores/trained/sft/mmlu"].work[1] // 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mfuu=0.3", "there is no assumption 'mfuu'; did you mean 'mfu'?"),
        ("mfu=high", "--assume mfu=high: expected mfu=NUMBER"),
        ("mfu=-1", "--assume mfu=-1: expected a number that is not negative"),
        ("mfu=inf", "--assume mfu=inf: expected a number that is not negative"),
    ],
)
def test_a_mistake_in_an_assumption_is_reported_with_the_word(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Assumptions().parse(["peak=1e12", word])
