"""What jobs ask a cluster for: little for little models, enough for large ones, no more than a site allows."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmfusion import ROOT
from llmfusion.study import requests
from llmfusion.study.snakemake import Limits, WorkflowStudy, checked
from llmfusion.study.workload import Assumptions, JobWork, Workload


def jobs_of(study: str) -> dict[str, JobWork]:
    return Workload(*checked(ROOT / f"config/{study}.yaml"), Assumptions()).jobs


@pytest.fixture(scope="module")
def paper() -> dict[str, JobWork]:
    return jobs_of("config")


def test_the_miniatures_jobs_ask_for_little() -> None:
    jobs = jobs_of("mini").values()
    assert {requests.memory_mb(job, 1) for job in jobs} == {5000}
    assert {requests.minutes(job, 1) for job in jobs} == {requests.SHORTEST}


def test_a_job_of_an_8b_model_gets_room_for_it(paper: dict[str, JobWork]) -> None:
    """Weights of 8B parameters: 16 GB in bfloat16; with moments and gradients in float32 128 GB, over all GPUs."""
    assert 128_000 < requests.memory_mb(paper["models/trained/sft"], 1) < 1_000_000
    for address in ("answers/base/pivot/math", "teachers/base/openmath2-llama3.1-8b/infifusion"):
        assert 20_000 < requests.memory_mb(paper[address], 1) < 64_000
    assert 8_000 < requests.memory_mb(paper["models/merged/ties-all"], 1) < 32_000  # streamed
    assert 8_000 < requests.memory_mb(paper["models/base/pivot"], 1) < 32_000
    assert 5_000 < requests.memory_mb(paper["data/mix/infifusion"], 1) < 32_000


def test_memory_grows_with_the_attempt_and_time_only_where_a_job_does_not_resume(paper: dict[str, JobWork]) -> None:
    training, answers = paper["models/trained/sft"], paper["answers/base/pivot/math"]
    assert [requests.memory_mb(training, n) for n in (1, 2, 3)] == [
        requests.memory_mb(training, 1) * n for n in (1, 2, 3)
    ]
    assert len({requests.minutes(training, n) for n in (1, 2, 3)}) == 1
    assert [requests.minutes(answers, n) for n in (1, 2, 3)] == [requests.minutes(answers, 1) * n for n in (1, 2, 3)]


def test_no_job_asks_for_more_time_than_the_site_allows(paper: dict[str, JobWork]) -> None:
    longest = max(paper.values(), key=lambda job: requests.minutes(job, 3))
    assert requests.minutes(longest, 3) > 1440
    assert requests.minutes(longest, 3, 1440) == 1440
    assert requests.minutes(replace(longest, work=tuple(1e9 * amount for amount in longest.work)), 1, 600) == 600


def test_a_limit_comes_from_the_profile_and_without_one_a_job_on_this_machine_has_none() -> None:
    study, graph = checked(ROOT / "config/mini.yaml")
    pattern, wildcards = "models/trained/{trained}", {"trained": "sft"}
    for resources, expected in ((None, requests.UNLIMITED), ({}, 60), ({"max_runtime": 30}, 30)):
        workflow = WorkflowStudy(study, graph, Limits.of(resources))
        assert workflow.minutes(pattern)(wildcards, 1) == expected
        assert workflow.memory_mb(pattern)(wildcards, 2) == 10_000


@pytest.mark.parametrize("value", ["24h", 0, -5, True, 1.5])
def test_a_limit_that_is_no_number_of_minutes_is_an_error_in_one_sentence(value: object) -> None:
    with pytest.raises(SystemExit, match=f"max_runtime: got {value}; expected minutes, a whole number"):
        Limits.of({"max_runtime": value})


def test_requests_follow_what_has_been_staged(tmp_path: Path) -> None:
    """Snakemake asks again when a job's inputs are there; its processes within the job come to the same number."""
    study, graph = checked(ROOT / "config/config.yaml")
    workflow = WorkflowStudy(study.model_copy(update={"directory": str(tmp_path)}), graph, Limits(True))
    ask = workflow.memory_mb("answers/{model}/{batch}")
    wildcards = {"model": "base/pivot", "batch": "math"}
    before = ask(wildcards, 1)
    manifest = tmp_path / "results/models/base/pivot/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"facts": {"parameters": 100000000, "hidden_size": 512}}')
    assert ask(wildcards, 1) < before
