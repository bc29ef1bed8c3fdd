"""Provenance says where and with what, and nothing of the environment."""

import json
import re
import time
from importlib import metadata

import pytest

from llmfusion.artifacts import provenance

SECRET = "hf_s3cr3tT0kenThatMustNotLeak"


def test_no_environment_variable_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "PATH_EXTRA"):
        monkeypatch.setenv(name, SECRET)
    assert SECRET not in json.dumps(provenance.collect(time.time()))


def test_only_the_job_and_the_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = provenance.collect(time.time())
    assert (found["slurm_job"], found["threads"]) == ("4711", "3")


def test_times_and_versions_are_those_of_this_process() -> None:
    found = provenance.collect(0.0)
    assert found["started"] == "1970-01-01T00:00:00Z"
    assert found["versions"]["pydantic"] == metadata.version("pydantic")
    assert None not in found["versions"].values()


def test_the_commit_is_a_commit_and_its_absence_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    commit = provenance._git()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance._git() is None
    monkeypatch.setenv("PATH", "")
    assert provenance._git() is None
