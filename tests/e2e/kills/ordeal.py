"""The tiny study, killed at random moments and started again as a user would: Snakemake itself, and its jobs."""

import contextlib
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import psutil

from tests.e2e.conftest import PROFILE, TARGET
from tests.project import environment, left_over, llmfusion, results, runs_llmfusion, snakemake, text_of

LIMIT_SECONDS = 3600


class Ordeal:
    """Runs the study in ``folder`` and kills what it started itself and nothing else."""

    def __init__(self, folder: Path, made: Path, seed: int):
        self.folder = folder
        self.random = Random(seed)
        self.names = [name for name in results(made) if not name.endswith((".csv", ".md"))]
        self.missing = len(self.names) - self.done()
        self.began = time.monotonic()
        self.jobs: dict[int, psutil.Process] = {}  # of all Snakemakes started here: what has been killed leaves orphans
        self.protocol: list[str] = []
        self.hits = {"main": 0, "job": 0}

    def done(self) -> int:
        """Number of manifests that are there."""
        return sum((self.folder / "runs/tiny/results" / name).exists() for name in self.names)

    def run(self, kills: list[str]) -> None:
        """Run until the table is there, with the kills (main or job) spread over what there is to make.

        Those for which the run was too short stay in the list.
        """
        main = self.start()
        try:
            main = self._run(main, kills)
            _gone, living = psutil.wait_procs(self.jobs.values(), 300)
            assert not living, self.report(f"still there: {living}")
        finally:
            for process in [psutil.Process(main.pid)] if main.poll() is None else []:
                process.kill()
            for process in self.jobs.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _run(self, main: subprocess.Popen, kills: list[str]) -> subprocess.Popen:
        """Returns the Snakemake that ended well."""
        every = self.missing / max(len(kills), 1)
        first = self.done()
        moment: float | None = None  # of the next kill
        number = 0  # of kills so far
        since = 0  # of them, since Snakemake was started
        deadline = time.monotonic() + LIMIT_SECONDS
        while (status := main.poll()) != 0:
            assert time.monotonic() < deadline, self.report("did not end")
            if status is not None:
                assert since, self.report(f"ended with status {status}, and nothing was killed")
                main = self.start()
                since = 0
            self._see(main)
            if kills and moment is None and self.done() >= first + number * every:
                moment = time.monotonic() + self.random.uniform(0, 5)
            if moment is None or time.monotonic() < moment:
                time.sleep(0.1)
            elif self._kill_main(main) if kills[0] == "main" else self._kill_job():
                number += 1
                since += 1
                moment = None
                if kills.pop(0) == "main":
                    snakemake(self.folder, *PROFILE, "--unlock")
                    main = self.start()
                    since = 0
        return main

    def start(self) -> subprocess.Popen:
        """Snakemake, as its user starts it."""
        self.record("start")
        with open(self.folder / "run.log", "a") as out:
            words = ["snakemake", *PROFILE, "--cores", "2", TARGET]
            return subprocess.Popen(words, cwd=self.folder, env=environment(), stdout=out, stderr=out)

    def _see(self, main: subprocess.Popen) -> None:
        """Remember the jobs of this Snakemake; psutil tells a process from a later one with the same number."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(main.pid).children(recursive=True):
                self.jobs.setdefault(process.pid, process)
        self.jobs = {pid: process for pid, process in self.jobs.items() if _lives(process)}

    def _kill_main(self, main: subprocess.Popen) -> bool:
        main.send_signal(signal.SIGSTOP)
        self._see(main)
        if not _killed(psutil.Process(main.pid)):
            return False
        assert main.wait() == -signal.SIGKILL
        self.hits["main"] += 1
        self.record(f"kill main {main.pid}, orphans {sorted(self.jobs)}", self.folder / "run.log")
        return True

    def _kill_job(self) -> bool:
        """Kill one process of a running job, or the job with all it started; the job may be an orphan."""
        chosen = [process for process in self.jobs.values() if runs_llmfusion(_command_line(process))]
        if not chosen:
            return False
        process = self.random.choice(chosen)
        words = " ".join(_command_line(process))
        how = self.random.choice(["process", "group"])
        group = [process]
        if how == "group":
            with contextlib.suppress(psutil.NoSuchProcess):
                group += process.children(recursive=True)
        if not [p for p in group if _killed(p)]:
            return False
        self.hits["job"] += 1
        out = re.search(r"--out \S*?results/(\S+?)(/manifest)?\.(json|csv)", words)
        log = self.folder / "runs/tiny/logs" / f"{out[1] if out else 'unknown'}.log"
        program = words.split()[0].rsplit("/")[-1]
        self.record(f"kill job {how} {[p.pid for p in group]} {program} {out[1] if out else words[:80]}", log)
        return True

    def record(self, event: str, log: Path | None = None) -> None:
        """One line in the protocol, with the last line of a log."""
        last = text_of(log).strip().splitlines()[-1:] if log else []
        seconds = time.monotonic() - self.began
        line = f"{seconds:7.1f} s  {self.done():2}/{len(self.names)} done  {event}"
        self.protocol.append(line + (f" | {last[0][:90]}" if last else ""))
        with open(self.folder / "kills.log", "a") as file:
            file.write(self.protocol[-1] + "\n")

    def report(self, problem: str) -> str:
        """A message with the protocol and the end of Snakemake's output."""
        return "\n".join([problem, *self.protocol, text_of(self.folder / "run.log")[-4000:]])


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _killed(process: psutil.Process) -> bool:
    """Kill a process; False if it had ended by itself. It is stopped first, so that it cannot end in between."""
    try:
        process.suspend()
        hit = _lives(process)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return hit


def same_as_undisturbed(folder: Path, made: Path) -> None:
    """Every table, score and manifest is there with the same bytes, they verify, and nothing else lies about."""
    mine, theirs = results(folder), results(made)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    done = llmfusion(folder, "verify", "runs/tiny/results/table2.csv")
    assert done.returncode == 0, done.stderr
    assert "all match" in done.stdout
    assert left_over(folder / "runs/tiny") == []


def without(made: Path, folder: Path, *gone: str) -> Path:
    """Put the finished study into ``folder``, without some artifacts."""
    shutil.copytree(made / "runs/tiny", folder / "runs/tiny", symlinks=True)
    for name in gone:
        path = folder / "runs/tiny/results" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder
