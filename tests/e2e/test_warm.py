"""Steps as forks of a process with everything imported: the same artifacts, and they end with their command."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfusion.io.digests import canonical
from tests.e2e.conftest import TARGET, Project
from tests.project import environment

WARM = [sys.executable, "-m", "llmfusion", "warm", "--"]
DATASET = {"kind": "generated", "generator": "animals", "form": "chat", "domain": "general"}


def step(rows: int = 20, name: str = "made") -> list[str]:
    """A small step as a rule would start it."""
    spec = canonical({"recipe": 1, "step": "dataset", "dataset": {**DATASET, "rows": rows}})
    out = f"results/data/dataset/{name}/manifest.json"
    return [sys.executable, "-m", "llmfusion", "step", "stage_dataset", "--spec", spec, "--out", out]


def warm(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WARM, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture
def run_under_warm(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs Python text under warm; ``STEP`` there is the command of a long step."""

    def go(text: str) -> subprocess.CompletedProcess[str]:
        start = f"import subprocess, time\nfrom pathlib import Path\nSTEP = {step(400_000, 'long')!r}\n"
        (tmp_path / "go.py").write_text(start + text)
        return warm(tmp_path, sys.executable, "go.py")

    return go


def test_a_step_makes_the_same_artifact_writes_to_its_own_log_and_imports_nothing_itself(tmp_path: Path) -> None:
    subprocess.run(step(), cwd=tmp_path, env=environment(), check=True, capture_output=True)
    folder = tmp_path / "results/data/dataset/made"
    cold = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}
    subprocess.run(["rm", "-r", tmp_path / "results"], check=True)
    done = warm(tmp_path, "bash", "-c", '"$@" > log 2>&1', "-", *step())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"} == cold
    assert "20 samples of 20 rows" in (tmp_path / "log").read_text()
    assert json.loads((folder / "provenance.json").read_text())["versions"]["torch"]


def test_a_users_mistake_and_the_commands_own_status_come_through(tmp_path: Path) -> None:
    done = warm(tmp_path, *[word.replace("animals", "minerals") for word in step()])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") or "Traceback" in done.stderr  # what the step says without warm, too
    words = [word.replace("animals", "minerals") for word in step()]
    cold = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stderr == cold.stderr
    assert warm(tmp_path, "bash", "-c", "exit 7").returncode == 7
    assert warm(tmp_path, "/no/such/command").stderr.startswith("error: /no/such/command: ")
    assert "usage: " in warm(tmp_path).stderr
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    done = subprocess.run([*WARM, "true"], env={**environment(), "TMPDIR": str(deep)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (2, [done.stderr.strip()])
    assert "set TMPDIR to a local folder with a shorter path" in done.stderr


def test_where_nobody_listens_the_step_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        step(), cwd=tmp_path, env={**environment(), "LLMFUSION_WARM": "/no/socket"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    problem = "LLMFUSION_WARM names /no/socket, where nobody listens (No such file or directory)"
    assert done.stderr == f"error: {problem}: unset it, or run under `llmfusion warm`\n"


WAIT = """
process = subprocess.Popen(STEP)
drafts = lambda: list(Path("results/data/dataset").glob(".long*")) if Path("results/data/dataset").exists() else []
end = time.monotonic() + 60
while not (Path("work/data/dataset/long").exists() and drafts()) and time.monotonic() < end:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_fork_and_its_end_is_the_steps(
    run_under_warm: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path, number: int
) -> None:
    done = run_under_warm(WAIT + f"process.send_signal({number})\nprint('ended', process.wait(), drafts())")
    assert f"ended {128 + number} []" in done.stdout, done


def test_a_step_that_is_killed_takes_its_fork_with_it(
    run_under_warm: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = time.monotonic()
    done = run_under_warm(WAIT + "process.kill()\nprint('ended', process.wait())")
    assert "ended -9" in done.stdout
    assert not (tmp_path / "results/data/dataset/long/manifest.json").exists()
    assert time.monotonic() - before < 60
    again = subprocess.run(
        step(20, "long"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )  # nobody holds the lease
    assert again.returncode == 0, again.stderr


def test_forks_of_steps_whose_command_was_killed_are_waited_for(tmp_path: Path) -> None:
    """As without warm: Snakemake killed, its jobs go on."""
    done = warm(tmp_path, "bash", "-c", f"{shlex.join(step(2_000))} & sleep 0.5; kill -9 $$")
    assert done.returncode == 128 + signal.SIGKILL
    assert (tmp_path / "results/data/dataset/made/manifest.json").exists()


def test_a_study_comes_out_the_same_byte_for_byte(made: Path, project: Project) -> None:
    """Every kind of step, against the run of the same study without warm."""
    folder = project("warm")
    done = warm(folder, "snakemake", "--profile", "profiles/tiny", "--cores", "2", TARGET)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    ours, theirs = contents(folder), contents(made)
    assert ours.keys() == theirs.keys()
    assert [name for name, content in ours.items() if content != theirs[name]] == []


def contents(folder: Path) -> dict[str, bytes]:
    """Everything a run left in results, but for when and where it was made."""
    results = folder / "runs/tiny/results"
    return {
        str(p.relative_to(results)): p.read_bytes()
        for p in results.rglob("*")
        if p.is_file() and "provenance" not in p.name and not p.name.endswith("cost.csv")
    }
