"""Helpers of the workflow and end-to-end tests: copies of the project, small studies, and its commands."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmfusion.study import strict_yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SECRETS = {
    "HF_TOKEN": "hf_NobodyMaySeeThisToken",
    "WANDB_API_KEY": "0123456789seenbynobody",
    "MY_PASSWORD": "open sesame, nobody",
}


def clone(target: Path) -> Path:
    """A fresh copy of the project as it stands: what git tracks or would track, nothing generated."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def study(path: Path, change: Callable[[dict[str, Any]], None], start: str = "mini") -> Path:
    """Write a changed copy of one of the project's studies."""
    content, _ = strict_yaml.load(ROOT / f"config/{start}.yaml")
    content = {key: value for key, value in content.items() if not key.startswith("x-")}
    change(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def environment() -> dict[str, str]:
    """The environment of a user without SLURM but with secrets, with the project's own environment active."""
    return {
        **os.environ,
        **SECRETS,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "SLURM_CONF": "/dev/null",
        "OMP_NUM_THREADS": "1",
    }


def llmfusion(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``llmfusion WORDS`` in a folder: a copy of the project, which has code of its own, or any other."""
    source = folder / "src" if (folder / "src").is_dir() else ROOT / "src"
    return subprocess.run(
        [sys.executable, "-m", "llmfusion", *words],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )


def snakemake(folder: Path, *words: str, fails: bool = False) -> str:
    """Output of a Snakemake call in ``folder``; asserts that it succeeds, or with ``fails`` that it does not."""
    done = subprocess.run(["snakemake", *words], cwd=folder, env=environment(), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-6000:]
    return output


def jobs(output: str) -> Counter[str]:
    """Jobs by rule from Snakemake's own statistics, without the total."""
    table = re.search(r"Job stats:\njob +count\n[- ]+\n(.*?)\n\n", output, re.DOTALL)
    rows = (line.split() for line in table.group(1).splitlines()) if table else ()
    return Counter({rule: int(count) for rule, count in rows if rule != "total"})


def outputs(output: str) -> set[str]:
    """The first output of every job a dry run lists."""
    return set(re.findall(r"^    output: ([^,\n]+)", output, re.MULTILINE))


def planned(output: str) -> Iterator[tuple[str, str]]:
    """Every job that a dry run lists: its rule, and the block of lines that describes it."""
    for block in output.split("\nrule ")[1:]:
        yield block.split(":")[0], block


def command_in(log: Path) -> str:
    """The command that a step's log begins with; run it again to make the same artifact."""
    start = "# python -m llmfusion step "
    return next(line for line in log.read_text().splitlines() if line.startswith(start)).removeprefix("# ")


def is_step(words: Sequence[str], name: str) -> bool:
    """Whether a process's command line is that of the step of this name."""
    return list(words[1:5]) == ["-m", "llmfusion", "step", name]


def runs_llmfusion(words: Sequence[str]) -> bool:
    """Whether a command line is that of a step, of the shell around it, or of a process that a step started."""
    return "-m llmfusion" in " ".join(words)


def results(folder: Path, name: str = "tiny") -> dict[str, bytes]:
    """Everything that must be the same in two runs of a study: tables, scores and manifests by name."""
    base = folder / f"runs/{name}/results"
    return {
        str(p.relative_to(base)): p.read_bytes()
        for p in sorted(base.rglob("*"))
        if p.suffix in (".json", ".csv", ".md")
        and not p.name.endswith("cost.csv")
        and "provenance" not in p.name
        and p.is_file()
    }


def left_over(directory: Path) -> list[str]:
    """What a finished study must not hold: drafts, temporary files, resume state."""
    files = (p for p in (directory / "work").rglob("*") if p.is_file() and not p.name.startswith("lease"))
    work = (p for p in files if p != directory / "work/fingerprints.json")  # of the whole study, for later jobs
    return [str(p.relative_to(directory)) for p in [*(directory / "results").rglob(".*"), *work]]


def text_of(log: Path) -> str:
    """A log's text so far; nothing while Snakemake puts a new one in its place. An orphan may leave a hole in it."""
    try:
        return log.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 300) -> None:
    """Wait until ``condition()`` holds; fail if the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it was to be stopped"
        assert time.monotonic() < end, "did not come so far"
        time.sleep(0.02)


def cpu_seconds_of(call: Callable[[], Any]) -> float:
    """CPU seconds of the child processes that ``call`` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
