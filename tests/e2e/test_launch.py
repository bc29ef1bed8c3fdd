"""Processes started by the real torchrun: what they make, what is told of those that fail, and that none is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import small
from llmfusion.errors import UserError
from llmfusion.steps import train_model as train
from llmfusion.training.launch import run_processes
from tests.unit.stand_ins import ARCHITECTURE, artifact, job

STAND_IN = "tests.e2e.rank_stand_in"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_two_processes_give_their_facts_and_leave_nothing_else(tmp_path):
    pivot = tmp_path / "pivot"
    pivot.mkdir()
    (pivot / "manifest.json").write_text("{}")
    made = job(tmp_path, {"does": [None, None]}, {"models/base/pivot": artifact(pivot)}, minutes=7.0)
    run_processes(made, 2, STAND_IN)
    assert made.facts == {"total": 3.0, "inputs": ["models/base/pivot"], "minutes": 7.0, "key": "f"}
    assert [p.name for p in made.folder.iterdir()] == ["made"]
    assert not list(made.work.iterdir())


def test_the_mistake_of_one_process_is_told_in_its_words_and_ends_the_others(tmp_path):
    made = job(tmp_path, {"does": [None, "mistake"]})
    with pytest.raises(UserError, match=r"^the user can mend this$"):
        run_processes(made, 2, STAND_IN)
    assert not list(made.folder.iterdir())


def test_a_full_disk_is_told_as_one(tmp_path):
    with pytest.raises(OSError, match="No space left") as told:
        run_processes(job(tmp_path, {"does": ["full disk", None]}), 2, STAND_IN)
    assert told.value.errno == 28


@pytest.mark.parametrize(
    ("does", "said"),
    [("defect", "ZeroDivisionError: nobody expected this"), ("die", "process 1 of 2 ended without a word")],
)
def test_a_process_that_breaks_or_is_killed_ends_the_others_and_is_named(tmp_path, does, said):
    with pytest.raises(UserError, match=said):
        run_processes(job(tmp_path, {"does": [None, does]}), 2, STAND_IN)


def test_fewer_gpus_than_processes_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"2 processes, one GPU each, and this job sees 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        run_processes(job(tmp_path), 2, STAND_IN)


LONG = f"""
import sys
from pathlib import Path
from llmfusion.training.launch import run_processes
from tests.unit.stand_ins import job
run_processes(job(Path(sys.argv[1]), {{"does": ["long", "long"]}}), 2, "{STAND_IN}")
"""


@pytest.fixture
def running(tmp_path):
    """A process that has started two long ones, which are computing; and all of its descendants."""
    child = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path)], cwd=ROOT)
    work, end = tmp_path / "job/work", time.monotonic() + 60
    while len(list(work.glob("running-*"))) < 2:
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two
    yield child, family
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def gone(family, seconds=10.0):
    return not psutil.wait_procs(family, seconds)[1]


def test_sigterm_lets_them_save_and_ends_with_143(running, tmp_path):
    child, family = running
    for process in (*family, psutil.Process(child.pid)):  # as SLURM does: torchrun and the processes get it, too
        process.send_signal(signal.SIGTERM)
    assert child.wait(30) == 143
    assert (tmp_path / "job/work/saved").exists()
    assert gone(family)


def test_nobody_goes_on_when_the_one_that_started_them_is_killed(running):
    child, family = running
    child.kill()
    child.wait()
    assert gone(family)


def test_a_model_split_over_two_processes_becomes_an_ordinary_checkpoint(tmp_path):
    from llmfusion.models.loading import load_model, load_tokenizer

    mix, tokenizer, model = small.pieces(
        tmp_path, small.samples(12, 3, 12), {**ARCHITECTURE, "initializer_range": 0.02}, 300, 128
    )
    pivot = small.checkpoint(tmp_path, "pivot", model, tokenizer)
    inputs = {"models/base/pivot": pivot, "data/mix/m": mix}
    run = {"init": "base/pivot", "mix": "m", "steps": 3, "batch_size": 4, "lr": 1e-3, "save_dtype": "float32"}
    alone, together = (
        job(tmp_path, {"run": run}, inputs, "alone"),
        job(tmp_path, {"run": {**run, "processes": 2, "sharding": "full"}}, inputs, "together"),
    )
    train.build(alone)
    train.build(together)
    assert sorted(p.name for p in together.folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())
    assert together.facts == {**alone.facts, "loss": pytest.approx(alone.facts["loss"], rel=1e-5)}
    weights, expected = (
        load_model(artifact(made.folder, **made.facts), "float32").state_dict() for made in (together, alone)
    )
    before = model.state_dict()
    for name, value in expected.items():
        assert (weights[name] - value).norm() < 1e-3 * (value - before[name]).norm(), name
    assert load_tokenizer(together.folder, None).get_vocab() == tokenizer.get_vocab()
    assert [t["step"] for t in together.measured["training"]["timings"]] == [1, 3]
    assert not list((together.work).glob("processes-*"))


def test_artifacts_are_not_verified_once_more_by_each_process(tmp_path):
    from llmfusion.training.launch import _verified

    (tmp_path / "manifest.json").write_text('{"spec": "{}", "files": {"absent": {}}, "facts": {"x": 1}}')
    assert _verified(tmp_path).facts["x"] == 1
    assert artifact(tmp_path).folder == _verified(tmp_path).folder
