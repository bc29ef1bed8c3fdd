"""Helpers of the workflow and end-to-end tests: copies of the project, small studies, Snakemake as its users start it."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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


def snakemake(folder: Path, *words: str, fails: bool = False) -> str:
    """Output of a Snakemake call in ``folder``; asserts that it succeeds, or with ``fails`` that it does not."""
    done = subprocess.run(["snakemake", *words], cwd=folder, env=environment(), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-6000:]
    return output


def jobs(output: str) -> Counter[str]:
    """Jobs by rule from Snakemake's own statistics, without the total."""
    table = re.search(r"Job stats:\njob +count\n[- ]+\n(.*?)\n\n", output, re.DOTALL)
    found = (
        Counter({name: int(count) for name, count in (line.split() for line in table.group(1).splitlines())})
        if table
        else Counter()
    )
    found.pop("total", None)
    return found


def outputs(output: str) -> set[str]:
    """The first output of every job a dry run lists."""
    return set(re.findall(r"^    output: ([^,\n]+)", output, re.MULTILINE))


def cpu_seconds_of(call: Callable[[], Any]) -> float:
    """CPU seconds of the child processes that ``call`` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
