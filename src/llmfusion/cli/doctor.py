"""Can this machine do what a study needs? Reported before anything runs.

One line each for the study, cores, memory, GPU, sandbox, disk and token: ``ok``, ``note`` (works, but know this) or
``MISSING`` (the study cannot be finished here) with what to do. Exit status 1 if something is missing.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llmfusion import ROOT
from llmfusion.errors import UserError
from llmfusion.evaluation.sandbox import bubblewrap, require_isolation
from llmfusion.evaluation.task_format import load_format
from llmfusion.reporting.estimate import check_disk, estimate_of
from llmfusion.reporting.machine import GPU_DRIVER, assumptions_for
from llmfusion.study.errors import StudyError
from llmfusion.study.graph import build_graph
from llmfusion.study.hints import hints
from llmfusion.study.scales import SCALES
from llmfusion.study.schema.study import Study
from llmfusion.study.snakemake import checked


class Finding(NamedTuple):
    """What one check found: ``ok``, ``note`` or ``MISSING``, and a sentence."""

    verdict: str
    text: str


def cores(study: Study) -> Finding:
    """Cores this process may use, and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Finding("ok", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory")


def gpu(study: Study) -> Finding:
    """CUDA devices; only a study of some scales needs one."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        memory = devices[0].total_memory / 2**30
        text = f"{len(devices)} x {devices[0].name}, {memory:.0f} GiB each (torch {torch.__version__})"
        return Finding("ok", text)
    if GPU_DRIVER.exists():
        return Finding(
            "note",
            f"there is one, but torch {torch.__version__} cannot use it: install torch's CUDA build "
            "(see requirements.lock for the version)",
        )
    if not SCALES[study.scale].expects_gpu:
        return Finding("ok", f"none (torch {torch.__version__}); a study of scale {study.scale} needs none")
    return Finding(
        "note",
        f"none here (torch {torch.__version__}); jobs that run a model need one: "
        "start them on nodes that have it (--profile slurm)",
    )


def sandbox(study: Study) -> Finding:
    """Whether programs written by models can be run here, and whether the sandbox holds."""
    if not any(load_format(task.format).runs_programs for task in study.tasks.values()):
        return Finding("ok", "not needed: no task runs programs")
    try:
        require_isolation()
    except UserError as error:
        return Finding("MISSING", str(error))
    return Finding("ok", f"{bubblewrap()}: a program that tried to do harm could do nothing")


def disk(study: Study) -> Finding:
    """Room for what the study's tables need, as `llmfusion estimate` counts it, and whether leases can be held."""
    place = ROOT / study.directory
    try:
        place.mkdir(parents=True, exist_ok=True)
        _usable(place)
    except OSError as error:
        return Finding(
            "MISSING",
            f"{place}: files cannot be written, linked and renamed there ({error.strerror}); "
            "set the study's 'directory' to another place",
        )
    estimate, _ = estimate_of(study, build_graph(study), assumptions_for(study.scale))
    need = estimate.disk_need(estimate.trainings_at_once(estimate.devices))
    fits, message = check_disk(place, need)
    return Finding("note" if fits and need.unknown else "ok" if fits else "MISSING", message)


def _usable(place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".check-", dir=place) as folder:
        made = Path(folder) / "made"
        made.write_bytes(b"x")
        os.link(made, made.with_name("linked"))
        os.rename(made, made.with_name("renamed"))


def token(study: Study) -> Finding:
    """Whether the hub's token is there, never what it is."""
    from huggingface_hub import get_token

    hub = [entry.repo for entry in study.models.base.values() if entry.kind == "hub"]
    if not hub:
        return Finding("ok", "not needed: no model comes from the hub")
    if get_token():
        return Finding(
            "ok",
            "a Hugging Face token is set; accept the licences of gated repositories on the hub with the same account",
        )
    return Finding(
        "note",
        f"no Hugging Face token is set; gated repositories (of {', '.join(hub)}) refuse to be read without one: "
        "set HF_TOKEN",
    )


CHECKS: dict[str, Callable[[Study], Finding]] = {
    "cores": cores,
    "gpu": gpu,
    "sandbox": sandbox,
    "disk": disk,
    "token": token,
}


def findings(study: Study) -> Iterator[tuple[str, Finding]]:
    """Every check's name and finding, in the order of :data:`CHECKS`."""
    yield from ((name, check(study)) for name, check in CHECKS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study."""
    parser.add_argument(
        "study",
        nargs="?",
        type=Path,
        default=ROOT / "config/config.yaml",
        metavar="STUDY",
        help="study file (default: the paper's)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the machine for a study. Returns the exit status."""
    try:
        study, graph = checked(arguments.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'ok':8} {'study':8} {study.title}: {len(graph.artifacts)} artifacts")
    for hint in hints(study):
        print(f"{'note':8} {'study':8} {hint}")
    missing = 0
    for name, finding in findings(study):
        print(f"{finding.verdict:8} {name:8} {finding.text}", flush=True)
        missing += finding.verdict == "MISSING"
    return 1 if missing else 0
