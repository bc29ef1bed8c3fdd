"""Damage as Snakemake's jobs meet it: every step, in its own process, refuses an input before it loads anything."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llmfusion import ROOT
from tests.e2e.damage.finished import (
    CACHE,
    CODE,
    GENERATED,
    KD,
    MERGED,
    MIX,
    PIVOT,
    RESULTS,
    SFT,
    SHARD,
    assert_nothing_is_left_of,
    command_of,
    remove_artifact,
)
from tests.e2e.damage.test_files import damaged, flip
from tests.project import environment

INPUTS = {  # by artifact: a file of one of its inputs
    KD: f"{CACHE}/piece-00000.safetensors",
    CODE: "data/mix/code/samples.jsonl",
    MERGED: f"{SFT}/model.safetensors",
    CACHE: f"{SHARD}/piece-00000.safetensors",
    SHARD: f"{MIX}/samples.jsonl",
    GENERATED: f"{CODE}/model.safetensors",
    "answers/merged/ta-homogeneous/all": "data/tasks/humaneval/items.jsonl",
    "scores/trained/sft/mmlu": "answers/trained/sft/all/mmlu.jsonl",
    "tables/table2": "scores/base/code/mmlu.json",
    MIX: f"{PIVOT}/tokenizer.json",
}


def at_the_command_line(address: str, study: Path) -> subprocess.CompletedProcess[str]:
    """A step as Snakemake starts it, where torch cannot be loaded."""
    (study / "stub/torch").mkdir(parents=True, exist_ok=True)
    (study / "stub/torch/__init__.py").write_text("raise ImportError('torch was loaded')\n")
    return subprocess.run(
        ["bash", "-c", f"exec {shlex.join(command_of(address))}"],
        env={**environment(), "PYTHONPATH": f"{study}/stub:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("address", INPUTS)
def test_each_step_refuses_a_flipped_bit_before_it_loads_anything(study: Path, address: str) -> None:
    remove_artifact(address)
    path = RESULTS / INPUTS[address]
    with damaged(path, flip, "command line"):
        done = at_the_command_line(address, study)
    assert done.returncode == 1
    message = rf"error: {path}: .*make it again with: snakemake results/\S+\.json -f\n"
    assert re.fullmatch(message, done.stderr), done.stderr
    assert done.stdout.startswith("# python -m llmfusion step ")
    assert_nothing_is_left_of(address)


def test_the_torch_that_cannot_be_loaded_is_one_that_a_step_would_load(study: Path) -> None:
    remove_artifact(CACHE)
    assert "torch was loaded" in at_the_command_line(CACHE, study).stderr
