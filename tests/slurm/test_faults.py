"""What goes wrong on a cluster: in the end there are the bytes of an undisturbed run, and only one ever wrote them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from tests.project import environment, is_step
from tests.slurm.cluster import wait
from tests.slurm.conftest import STUDY, OnSlurm

pytestmark = pytest.mark.long


@pytest.fixture
def training(on_slurm: Callable[..., OnSlurm]) -> Callable[..., tuple[OnSlurm, subprocess.Popen]]:
    """Starts a run in which one training is left to make, and waits until it is at its first steps."""

    def begin(name: str, *more: str) -> tuple[OnSlurm, subprocess.Popen]:
        run = on_slurm(name, (f"models/trained/{name}",), f"results/models/trained/{name}/manifest.json")
        main = run.start(*more)
        wait(lambda: "step 1/" in run.log(f"models/trained/{name}") or main.poll() is not None, 300)
        assert main.poll() is None, run.output()
        return run, main

    return begin


def trainers(run: OnSlurm) -> list[psutil.Process]:
    """The processes that train in this run's folder."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run.folder) in process.cwd() and is_step(process.cmdline(), "train_model"):
                processes.append(process)
    return processes


def ends(run: OnSlurm) -> list[tuple[str, str]]:
    """State and time limit of each job of this run."""
    return [(job["JobState"], job["TimeLimit"]) for job in run.jobs()]


@pytest.mark.parametrize("name", ["sft", "kd-code"], ids=["one process", "two processes"])
def test_a_cancelled_training_goes_on_in_a_new_job(training: Callable, name: str) -> None:
    run, main = training(name)
    [first] = run.jobs()
    run.slurm.ask("scancel", first["JobId"])
    run.finish(main)
    assert "going on after step" in run.log(f"models/trained/{name}")
    assert [job["JobState"] for job in run.jobs()] == ["CANCELLED", "COMPLETED"]
    run.same_as_undisturbed()


def test_a_training_saves_before_its_time_ends_and_goes_on_with_more(training: Callable) -> None:
    run, main = training("sft", "--set-resources", "train_model:runtime=1 + 60 * (attempt - 1)")
    [trainer] = trainers(run)
    trainer.suspend()  # a slow step: another one would not fit into the minute
    time.sleep(20)
    trainer.resume()
    run.finish(main)
    assert "going on after step" in run.log("models/trained/sft")
    assert ends(run) == [("FAILED", "00:01:00"), ("COMPLETED", "01:01:00")]
    run.same_as_undisturbed()


def test_a_training_that_slurm_ends_at_its_time_limit_is_made_with_more_time(training: Callable) -> None:
    run, main = training("sft", "--set-resources", "train_model:runtime=1 + 60 * (attempt - 1)")
    [trainer] = trainers(run)
    trainer.suspend()  # a step that never ends: nothing can be saved
    run.finish(main)
    assert ends(run) == [("TIMEOUT", "00:01:00"), ("COMPLETED", "01:01:00")]
    run.same_as_undisturbed()


def test_a_job_of_a_node_that_fails_is_made_on_another(training: Callable) -> None:
    run, main = training("sft")
    [job] = run.jobs()
    node = job["NodeList"]
    run.slurm.kill_node(node)
    try:
        wait(lambda: run.jobs()[0]["JobState"] == "PENDING", 60)
        run.slurm.ask("scontrol", "update", f"jobid={job['JobId']}", "StartTime=now")  # SLURM waits two minutes
        run.finish(main)
    finally:
        run.slurm.start_node(node)
        run.slurm.ask("scontrol", "update", f"nodename={node}", "state=resume")
    [again] = run.jobs()
    assert (again["JobId"], again["JobState"], again["Restarts"]) == (job["JobId"], "COMPLETED", "1")
    assert again["NodeList"] != node
    run.same_as_undisturbed()


def test_a_preempted_job_is_queued_again_and_gives_the_same(training: Callable) -> None:
    run, main = training("sft", "--default-resources", "slurm_partition=scavenge", "mem_mb=8000", "runtime=60")
    [job] = run.jobs()
    assert job["Partition"] == "scavenge"
    environ = {**environment(), **run.slurm.environment}
    nodes = str(len(run.slurm.nodes))
    words = ["sbatch", "--partition", "urgent", "--nodes", nodes, "--exclusive", "--output", "/dev/null"]
    words += ["--wrap", "sleep 5"]
    subprocess.run(words, env=environ, check=True, capture_output=True)
    wait(lambda: run.jobs("train_model")[0]["JobState"] == "PENDING", 60)
    run.slurm.ask("scontrol", "update", f"jobid={job['JobId']}", "StartTime=now")
    run.finish(main)
    [again] = run.jobs("train_model")
    assert (again["JobId"], again["JobState"], again["Restarts"]) == (job["JobId"], "COMPLETED", "1")
    run.same_as_undisturbed()


def test_ctrl_c_cancels_the_jobs_and_the_same_command_goes_on(training: Callable) -> None:
    run, main = training("sft")
    main.send_signal(signal.SIGINT)
    assert main.wait(120) == 1, run.output()
    wait(lambda: run.jobs()[0]["JobState"] == "CANCELLED", 30)
    wait(lambda: not trainers(run), 30)
    run.finish(run.start())
    assert "going on after step" in run.log("models/trained/sft")
    run.same_as_undisturbed()


def test_snakemake_killed_and_started_again_while_its_job_lives_has_one_writer(training: Callable) -> None:
    run, main = training("sft")
    [trainer] = trainers(run)
    trainer.suspend()  # so that the second job meets it
    main.kill()
    main.wait()
    locked = run.start()
    assert locked.wait(120) == 1
    assert "cannot be locked" in run.output()
    unlock = ["snakemake", *STUDY, "--unlock"]
    subprocess.run(unlock, cwd=run.folder, env=environment(), check=True, capture_output=True)
    again = run.start()
    waiting = "waiting for work/models/trained/sft/lease"
    wait(lambda: waiting in run.slurm_logs() or again.poll() is not None, 300)
    assert "step 1/" in run.log("models/trained/sft")  # of the one that works
    os.kill(trainer.pid, signal.SIGCONT)
    run.finish(again)
    assert "was finished meanwhile; adopted" in run.log("models/trained/sft")
    assert len(run.jobs()) == 2
    run.same_as_undisturbed()
