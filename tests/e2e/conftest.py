"""A study small enough for tests: every rule, the real programs, models that hardly learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.project import clone, snakemake, study

TARGET = "results/table2.csv"
COST = "results/table2.cost.csv"
PROFILE = ("--profile", "profiles/tiny")
ROWS = ("base/pivot", "base/code", "trained/sft", "trained/seqkd-code", "trained/kd-code", "merged/ta-homogeneous")


def tiny(content: dict[str, Any]) -> None:
    """Shrink the miniature study: two tasks, one source, a few steps."""
    content["directory"] = "runs/tiny"
    content["capture"]["shards"] = 2
    models = content["models"]
    for kind in models:
        models[kind] = {name: entry for name, entry in models[kind].items() if f"{kind}/{name}" in ROWS}
    base, trained = models["base"], models["trained"]
    for run in [*base.values(), *trained.values()]:
        run["steps"] = 30
    trained["sft"]["steps"] = trained["kd-code"]["steps"] = 40
    content["models"]["merged"]["ta-homogeneous"]["parents"] = ["trained/kd-code", "trained/sft"]
    content["mixes"] = {
        "raw": {"datasets": {"text-facts": 400, "text-code": 400}, "max_length": 128},
        "code": {"datasets": {"chat-code": 400, "chat-general": 200}, "max_length": 128},
        "student": {
            **content["mixes"]["student"],
            "datasets": {"noisy-general": 100, "noisy-code": 100},
            "tokenizers": ["base/pivot", "base/code"],
        },
    }
    content["mixes"]["student"]["against"] = ["mmlu", "humaneval"]
    used = {name for mix in content["mixes"].values() for name in mix["datasets"]}
    content["datasets"] = {name: {**entry, "rows": 400} for name, entry in content["datasets"].items() if name in used}
    content["tasks"] = {name: content["tasks"][name] for name in ("mmlu", "humaneval")}
    for task in content["tasks"].values():
        task["items"]["rows"] = 24
    content["batches"] = {"all": ["mmlu", "humaneval"]}
    table = content["tables"]["table2"]
    table["tasks"] = ["mmlu", "humaneval"]
    table["rows"] = [row for row in table["rows"] if row["model"] in ROWS]


Project = Callable[[str], Path]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Makes fresh copies of the project, each with config/tiny.yaml and a profile for it."""

    def make(name: str) -> Path:
        folder = clone(tmp_path_factory.mktemp(name))
        study(folder / "config/tiny.yaml", tiny)
        profile = (folder / "profiles/mini/config.yaml").read_text()
        (folder / "profiles/tiny").mkdir()
        (folder / "profiles/tiny/config.yaml").write_text(profile.replace("mini.yaml", "tiny.yaml"))
        return folder

    return make


@pytest.fixture(scope="session")
def made(project: Project) -> Path:
    """A copy in which the tiny study has been run with two jobs at a time."""
    folder = project("made")
    (folder / "run.log").write_text(snakemake(folder, "--profile", "profiles/tiny", "--cores", "2", TARGET, COST))
    return folder
