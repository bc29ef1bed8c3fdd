"""Processes started by the real torchrun: their result, the message of one that fails, and that none is left behind."""

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
from llmfusion.artifacts.job import Job
from llmfusion.errors import UserError
from llmfusion.steps.train_model import build
from llmfusion.training.launch import run_processes
from tests.unit.stand_ins import ARCHITECTURE, artifact, job

STAND_IN = "tests.e2e.rank_stand_in:call"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def run(tmp_path):
    """Two processes, each of which does what it is given; what they exchange lies in ``tmp_path/work``."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "out").mkdir()
    return lambda *does: run_processes(STAND_IN, 2, {"does": does, "folder": str(tmp_path / "out")}, work)


def test_two_processes_give_the_first_ones_result_and_leave_nothing_else(tmp_path, run):
    assert run(None, None) == {"total": 3.0, "rank": 0}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["made"]
    assert not list((tmp_path / "work").iterdir())


def test_the_mistake_of_one_process_is_raised_with_its_message_and_ends_the_others(tmp_path, run):
    with pytest.raises(UserError, match=r"^the user can mend this$"):
        run(None, "mistake")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_raised_as_one(run):
    with pytest.raises(OSError, match="No space left") as error:
        run("full disk", None)
    assert error.value.errno == 28


@pytest.mark.parametrize(
    ("does", "message"),
    [("defect", "ZeroDivisionError: nobody expected this"), ("die", "process 1 of 2 ended without a message")],
)
def test_a_process_that_breaks_or_is_killed_ends_the_others_and_is_named(run, does, message):
    with pytest.raises(UserError, match=message):
        run(None, does)


def test_fewer_gpus_than_processes_are_refused_before_anything_starts(tmp_path, run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"2 processes, one GPU each, and this job sees 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        run(None, None)
    assert not list((tmp_path / "work").iterdir())


LONG = f"""
import sys
from pathlib import Path
from llmfusion.training.launch import run_processes
folder = Path(sys.argv[1])
run_processes("{STAND_IN}", 2, {{"does": ["long", "long"], "folder": str(folder)}}, folder)
"""


@pytest.fixture
def running(tmp_path):
    """A process that has started two long ones, which are computing; and all of its descendants."""
    child = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("running-*"))) < 2:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 3  # torchrun and two
    yield child, family
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def gone(family, seconds=10.0):
    return not psutil.wait_procs(family, seconds)[1]


def test_ctrl_c_lets_them_save_and_ends_with_143(running, tmp_path):
    """A terminal interrupts the job's process group, in which only the process is that has started the others."""
    child, family = running
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 143
    assert (tmp_path / "saved").exists()
    assert gone(family)


def test_sigterm_lets_them_save_and_ends_with_143(running, tmp_path):
    child, family = running
    for process in (*family, psutil.Process(child.pid)):  # as SLURM does
        process.send_signal(signal.SIGTERM)
    assert child.wait(30) == 143
    assert (tmp_path / "saved").exists()
    assert gone(family)


def test_nobody_goes_on_when_the_one_that_started_them_is_killed(running):
    child, family = running
    child.kill()
    child.wait()
    assert gone(family)


def test_a_model_split_over_two_processes_becomes_an_ordinary_checkpoint(tmp_path):
    from llmfusion.models.loading import load_model, load_tokenizer

    architecture = {**ARCHITECTURE, "initializer_range": 0.02}
    mix, tokenizer, model = small.pieces(tmp_path, small.samples(12, 3, 12), architecture, 300, 128)
    inputs = {"models/base/pivot": small.checkpoint(tmp_path, "pivot", model, tokenizer), "data/mix/m": mix}
    run = {"init": "base/pivot", "mix": "m", "steps": 3, "batch_size": 4, "lr": 1e-3, "save_dtype": "float32"}
    alone = job(tmp_path, {"run": run}, inputs, "alone")
    together = job(tmp_path, {"run": {**run, "processes": 2, "sharding": "full"}}, inputs, "together")
    build(alone)
    build(together)
    assert sorted(p.name for p in together.folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())
    assert together.facts == {**alone.facts, "loss": pytest.approx(alone.facts["loss"], rel=1e-5)}
    assert together.start_seconds is not None
    weights, expected = (
        load_model(artifact(made.folder, **made.facts), "float32").state_dict() for made in (together, alone)
    )
    before = model.state_dict()
    for name, value in expected.items():
        assert (weights[name] - value).norm() < 1e-3 * (value - before[name]).norm(), name
    assert load_tokenizer(together.folder, None).get_vocab() == tokenizer.get_vocab()
    assert [t["step"] for t in together.measured["training"]["timings"]] == [1, 3]
    assert not list((together.work).glob("processes-*"))


def test_a_job_in_another_process_is_the_same_and_its_inputs_are_not_verified_once_more(tmp_path):
    pivot = tmp_path / "pivot"
    pivot.mkdir()
    (pivot / "manifest.json").write_text('{"spec": "{}", "files": {"absent": {}}, "facts": {"x": 1}}')
    made = job(tmp_path, {"a": 1}, {"models/base/pivot": artifact(pivot)}, time_limit_minutes=7.0)
    there = Job.from_json(made.to_json())
    assert there.input("models/base/pivot").facts["x"] == 1
    assert there.input("models/base/pivot").folder == pivot
    same = ("spec", "folder", "work", "facts", "key", "time_limit_minutes", "began")
    assert all(getattr(there, name) == getattr(made, name) for name in same)
