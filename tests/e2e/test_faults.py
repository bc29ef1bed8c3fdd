"""Kills, orphans and damage: nothing wrong reaches a table, nothing finished is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.conftest import TARGET, Project
from tests.e2e.test_runs import PROFILE, results
from tests.project import environment, snakemake


def test_a_killed_main_process_and_an_immediate_re_run_have_one_writer(made: Path, project: Project) -> None:
    folder = project("killed")
    main = subprocess.Popen(
        ["snakemake", *PROFILE, "--cores", "2", TARGET],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "runs/tiny/logs/models/base/code.log"
    wait(lambda: "step 1/" in said(log), main)
    orphan = json.loads((folder / "runs/tiny/work/models/base/code/lease").read_text())["pid"]
    os.kill(orphan, signal.SIGSTOP)  # alive, and slow enough for the second run to meet it
    main.send_signal(signal.SIGKILL)
    main.wait()
    snakemake(folder, *PROFILE, "--unlock")
    again = subprocess.Popen(
        ["snakemake", *PROFILE, "--cores", "2", TARGET],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait(lambda: "waiting for work/models/base/code/lease" in said(log), again)
    finally:
        os.kill(orphan, signal.SIGCONT)
    output, _ = again.communicate()
    assert again.returncode == 0, output[-4000:]
    assert "finished meanwhile; adopted" in said(log)
    assert results(folder) == results(made)
    assert list((folder / "runs/tiny/results").rglob(".*.draft")) == []


def test_a_training_ended_by_sigterm_goes_on_bit_for_bit(made: Path, project: Project) -> None:
    folder = project("ended")
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    place = folder / "runs/tiny/results/models/trained/kd-code"
    shutil.rmtree(place)
    command = next(
        line
        for line in (made / "runs/tiny/logs/models/trained/kd-code.log").read_text().splitlines()
        if line.startswith("# python")
    )
    log = folder / "train.log"
    with open(log, "w") as out:
        words = ["bash", "-c", "exec " + command.removeprefix("# ")]
        train = subprocess.Popen(
            words,
            cwd=folder / "runs/tiny",
            env={**environment(), "PYTHONPATH": str(folder / "src")},
            stdout=out,
            stderr=out,
        )
        wait(lambda: "step 1/" in said(log), train)
        train.send_signal(signal.SIGTERM)
        assert train.wait() == 143, log.read_text()
    assert "the state is saved" in log.read_text()
    assert not place.exists()
    snakemake(folder, *PROFILE, "results/models/trained/kd-code/manifest.json")
    assert "going on after step" in (folder / "runs/tiny/logs/models/trained/kd-code.log").read_text()
    assert results(folder) == results(made)


def test_a_flipped_bit_under_an_old_date_is_refused_by_the_next_reader_and_named(made: Path, project: Project) -> None:
    folder = project("damaged")
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    weights = folder / "runs/tiny/results/models/trained/sft/model.safetensors"
    dates, content = weights.stat(), bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    output = snakemake(folder, *PROFILE, "results/scores/trained/sft/mmlu.json", "-R", "answer", fails=True)
    assert "trained/sft/model.safetensors: damaged: expected sha256" in output
    assert "Traceback" not in output
    verify = [sys.executable, "-m", "llmfusion.cli.verify", "runs/tiny/results/table2.csv"]
    done = subprocess.run(verify, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "trained/sft/model.safetensors: damaged" in done.stderr


def test_verify_walks_from_the_table_to_every_hash(made: Path) -> None:
    verify = [sys.executable, "-m", "llmfusion.cli.verify", "runs/tiny/results/table2.csv"]
    done = subprocess.run(verify, cwd=made, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all match" in done.stdout
    for address in ("data/dataset/noisy-code", "data/tasks/humaneval", "models/base/pivot"):
        assert address in done.stdout


def said(log: Path) -> str:
    """What a log says so far; nothing while Snakemake puts a new one in its place. An orphan may leave a hole in it."""
    try:
        return log.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def wait(condition: object, process: subprocess.Popen, seconds: float = 300) -> None:
    """Wait until ``condition()`` holds; fail if the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "ended before it was to be stopped"
        assert time.monotonic() < end, "did not come so far"
        time.sleep(0.02)
