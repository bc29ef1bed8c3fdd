"""Where, when and with what an artifact was made. Kept beside the manifest, so that manifests stay comparable."""

import os
import platform
import socket
import subprocess
import sys
import time
from typing import Any

from llmfusion import ROOT, __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "numba",
    "pyarrow",
    "datasets",
    "lm_eval",
    "pydantic",
    "snakemake",
)


def collect(started: float) -> dict[str, Any]:
    """Provenance of a job that began at ``started`` (seconds since the epoch). Holds no environment variables."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": _gpu(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu_peak_mb": _gpu_peak(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "llmfusion": __version__,
        "git": _git(),
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _gpu_peak() -> int | None:
    """Peak GPU memory in MB that torch held in this process; None where other processes did the computation."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated() / 1e6) or None


def _git() -> str | None:
    """Commit of the clone, with ``+changes`` if tracked files differ from it."""
    try:
        commit = _run_git("rev-parse", "HEAD")
        changes = _run_git("status", "--porcelain", "-uno")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _run_git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
