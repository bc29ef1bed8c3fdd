"""Kills, orphans and damage: nothing wrong reaches a table, nothing finished is lost."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from llmfusion.io.digests import canonical
from tests.e2e.conftest import PROFILE, TARGET, Project
from tests.project import command_in, environment, llmfusion, results, snakemake, text_of, wait_until


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
    wait_until(lambda: "step 1/" in text_of(log), main)
    orphan = json.loads((folder / "runs/tiny/work/models/base/code/lease").read_text())["pid"]
    os.kill(orphan, signal.SIGSTOP)  # alive, and slow enough for the second run to meet it
    main.send_signal(signal.SIGKILL)
    main.wait()
    snakemake(folder, *PROFILE, "--unlock")
    run_log = folder / "again.log"  # the log of the job is the orphan's until it has ended
    with open(run_log, "w") as out:
        words = ["snakemake", *PROFILE, "--cores", "2", TARGET]
        again = subprocess.Popen(words, cwd=folder, env=environment(), stdout=out, stderr=out)
    try:
        wait_until(lambda: "waiting for work/models/base/code/lease" in text_of(run_log), again)
    finally:
        os.kill(orphan, signal.SIGCONT)
    assert again.wait() == 0, text_of(run_log)[-4000:]
    assert "finished meanwhile; adopted" in text_of(log)
    assert results(folder) == results(made)
    assert list((folder / "runs/tiny/results").rglob(".*.draft")) == []


def test_a_training_ended_by_sigterm_goes_on_bit_for_bit(made: Path, project: Project) -> None:
    folder = project("ended")
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    place = folder / "runs/tiny/results/models/trained/kd-code"
    shutil.rmtree(place)
    command = re.sub(r" --log \S+", "", command_in(made / "runs/tiny/logs/models/trained/kd-code.log"))
    log = folder / "train.log"
    with open(log, "w") as out:
        words = ["bash", "-c", f"exec {command}"]
        train = subprocess.Popen(
            words,
            cwd=folder / "runs/tiny",
            env={**environment(), "PYTHONPATH": str(folder / "src")},
            stdout=out,
            stderr=out,
        )
        wait_until(lambda: "step 1/" in text_of(log), train)
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
    dates = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    output = snakemake(folder, *PROFILE, "results/scores/trained/sft/mmlu.json", "-R", "answer", fails=True)
    assert "trained/sft/model.safetensors: damaged: expected sha256" in output
    assert "Traceback" not in output
    done = llmfusion(folder, "verify", "runs/tiny/results/table2.csv")
    assert done.returncode == 1
    assert "trained/sft/model.safetensors: damaged" in done.stderr


def test_verify_walks_from_the_table_to_every_hash(made: Path) -> None:
    done = llmfusion(made, "verify", "runs/tiny/results/table2.csv")
    assert done.returncode == 0, done.stderr
    assert "all match" in done.stdout
    for address in ("data/dataset/noisy-code", "data/tasks/humaneval", "models/base/pivot"):
        assert address in done.stdout


def test_swapped_models_and_one_of_another_study_are_refused_by_the_next_reader(made: Path, project: Project) -> None:
    folder = project("swapped")
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    models = folder / "runs/tiny/results/models/trained"
    planned = json.loads((folder / "runs/tiny/work/fingerprints.json").read_text())
    for name in ("kd-code", "sft", "seqkd-code"):
        manifest = json.loads((models / name / "manifest.json").read_text())
        assert planned[f"models/trained/{name}"] == manifest["fingerprint"]
    (models / "kd-code").rename(models / "aside")
    (models / "sft").rename(models / "kd-code")
    (models / "aside").rename(models / "sft")
    command = re.sub(r" --log \S+", "", command_in(folder / "runs/tiny/logs/answers/trained/sft/all.log"))
    shutil.rmtree(folder / "runs/tiny/results/answers/trained/sft")

    def answer() -> str:
        done = subprocess.run(
            ["bash", "-c", f"exec {command}"],
            cwd=folder / "runs/tiny",
            env={**environment(), "PYTHONPATH": str(folder / "src")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    expected = "is the manifest of models/trained/kd-code, expected that of models/trained/sft: it was moved or copied"
    assert f"results/models/trained/sft/manifest.json: {expected}" in answer()
    other = models / "sft"
    shutil.rmtree(other)
    shutil.copytree(made / "runs/tiny/results/models/trained/sft", other)
    content = json.loads((other / "manifest.json").read_text())
    content.pop("sha256")
    content.update(fingerprint="0" * 64)  # of another study, where this address was made with other settings
    own = hashlib.sha256(canonical(content).encode()).hexdigest()
    (other / "manifest.json").write_text(json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n")
    assert "models/trained/sft/manifest.json: was made by another study or with other settings" in answer()


def test_ctrl_c_saves_a_training_and_leaves_no_draft_and_no_traceback(made: Path, project: Project) -> None:
    """As a terminal does: the signal reaches Snakemake, the shell and the step."""
    folder = project("interrupted")
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    shutil.rmtree(folder / "runs/tiny/results/models/trained/kd-code")
    log = folder / "runs/tiny/logs/models/trained/kd-code.log"
    log.unlink()
    main = subprocess.Popen(
        ["snakemake", *PROFILE, "--cores", "1", "results/models/trained/kd-code/manifest.json"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: "step 1/" in text_of(log), main)
    lease = json.loads((folder / "runs/tiny/work/models/trained/kd-code/lease").read_text())
    os.killpg(main.pid, signal.SIGINT)
    output, _ = main.communicate(timeout=120)
    assert main.returncode != 0
    deadline = time.monotonic() + 60
    while Path(f"/proc/{lease['pid']}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)  # Snakemake does not wait for what it has ended
    assert "Traceback" not in text_of(log)
    assert [p.name for p in (folder / "runs/tiny/work/models/trained/kd-code/state").glob("*.safetensors")], output
    assert list((folder / "runs/tiny/results/models/trained").glob(".*")) == []
    assert not (folder / "runs/tiny/work/models/trained/kd-code/lease").exists()
    snakemake(folder, *PROFILE, "results/models/trained/kd-code/manifest.json")
    assert "going on after step" in text_of(log)
    assert results(folder) == results(made)
