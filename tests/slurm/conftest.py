"""A cluster for the session, and a slice of the miniature study made without it, as a run on SLURM must give it."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmfusion.study.kinds import all_kinds
from tests.e2e.conftest import tiny
from tests.project import BIN, clone, environment, left_over, results, study, text_of
from tests.slurm.cluster import Cluster, cluster

TARGET = "results/table2.csv"
STUDY = ("--configfile", "config/slice.yaml")
PROFILE = ("--profile", "slurm")
# the test cluster has no accounting and answers at once; a site needs none of this
HERE = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "4", "--latency-wait", "5")
# two threads add in another order than the local run's one
ONE_THREAD = ("--set-threads", *(f"{rule}=1" for rule, kind in all_kinds().items() if not kind.is_local))
ROW = "merged/ta-homogeneous"
MADE_ON_SLURM = ("models/trained", "models/merged", "answers", "scores", "table2.csv", "table2.md", "table2.json")


def slice_of(content: dict[str, Any]) -> None:
    """One row: a merge of SFT and of a fusion by two processes, on two tasks. Six jobs; the rest is made before."""
    tiny(content)
    content["directory"] = "runs/slice"
    models, table = content["models"], content["tables"]["table2"]
    models["trained"] = {name: models["trained"][name] for name in ("sft", "kd-code")}
    models["trained"]["kd-code"]["processes"] = 2
    models["trained"]["sft"]["steps"] = 300  # long enough to be disturbed
    models["trained"]["kd-code"]["steps"] = 150
    table.pop("reference", None)
    table["rows"] = [row for row in table["rows"] if row["model"] == ROW]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed() -> Iterator[Path]:
    """A copy of the project in which the slice has been made by the local executor."""
    place = Path(tempfile.mkdtemp(prefix="llmfusion-slice-"))
    folder = clone(place / "local")
    study(folder / "config/slice.yaml", slice_of)
    words = ["snakemake", TARGET, *STUDY, "--cores", "2"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    shutil.rmtree(place)


class OnSlurm:
    """A copy of the project with the start of the slice in it, to be finished on the cluster."""

    def __init__(self, folder: Path, slurm: Cluster, undisturbed: Path, target: str = TARGET):
        self.folder = folder
        self.slurm = slurm
        self.undisturbed = undisturbed
        self.target = target
        self.study = STUDY
        self.before = {job["JobId"] for job in slurm.jobs()}

    def words(self, *more: str) -> list[str]:
        return ["snakemake", *PROFILE, self.target, *self.study, *HERE, *ONE_THREAD, *more]

    def start(self, *more: str) -> subprocess.Popen:
        """Snakemake as a user starts it on a login node; what it prints goes to ``run.log``."""
        path = os.pathsep.join([str(BIN), self.slurm.environment["PATH"]])
        environ = {**environment(), **self.slurm.environment, "PATH": path}
        with open(self.folder / "run.log", "a") as log:
            return subprocess.Popen(
                self.words(*more), cwd=self.folder, env=environ, stdout=log, stderr=log, preexec_fn=_as_from_a_terminal
            )

    def output(self) -> str:
        """What Snakemake has printed."""
        return (self.folder / "run.log").read_text()

    def finish(self, main: subprocess.Popen, seconds: float = 600) -> None:
        assert main.wait(seconds) == 0, self.output()[-8000:]

    def jobs(self, of: str = "") -> list[dict[str, str]]:
        """This run's SLURM jobs whose comment names a rule, in the order they were submitted."""
        jobs = (job for job in self.slurm.jobs() if job["JobId"] not in self.before and of in job.get("Comment", ""))
        return sorted(jobs, key=lambda job: (int(job["JobId"]), int(job.get("ArrayTaskId", "0"))))

    def provenance(self, artifact: str) -> dict[str, Any]:
        return json.loads((self.folder / f"runs/slice/results/{artifact}/provenance.json").read_bytes())

    def log(self, artifact: str) -> str:
        return text_of(self.folder / f"runs/slice/logs/{artifact}.log")

    def slurm_logs(self) -> str:
        """What jobs have printed besides their logs."""
        return "".join(map(text_of, sorted((self.folder / "logs/slurm").rglob("*.log"))))

    def same_as_undisturbed(self) -> None:
        """Every table, score and manifest has the bytes of the local run, and nothing else lies about."""
        mine, theirs = results(self.folder, "slice"), results(self.undisturbed, "slice")
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name] != theirs[name]] == []
        assert left_over(self.folder / "runs/slice") == []


@pytest.fixture
def on_slurm(slurm: Cluster, undisturbed: Path, tmp_path: Path) -> Callable[..., OnSlurm]:
    """Makes copies in which what stands in ``without`` is yet to be made."""

    def make(name: str, without: tuple[str, ...] = MADE_ON_SLURM, target: str = TARGET) -> OnSlurm:
        folder = shutil.copytree(undisturbed, tmp_path / name, symlinks=True)
        for gone in without:
            path = folder / "runs/slice/results" / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(folder / "runs/slice/logs")
        return OnSlurm(folder, slurm, undisturbed, target)

    return make


def _as_from_a_terminal() -> None:
    # tests started in the background ignore it, and so would all they start
    signal.signal(signal.SIGINT, signal.SIG_DFL)
