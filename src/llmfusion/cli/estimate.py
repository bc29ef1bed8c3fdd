"""Jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions (``--assume mfu=0.3``), and from what jobs that have finished took:
the study's own, or with ``--measured-by`` those of another study on the same machine. Sizes of models come from their
files; ``--staging`` asks the hub for those that are not here, and lists what will be downloaded. Exit status 1 if the
disk will not hold it.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmfusion import ROOT

if TYPE_CHECKING:
    from llmfusion.study.schema.study import Study
    from llmfusion.study.sizes import ModelSize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, the GPUs and what is assumed."""
    parser.add_argument(
        "study",
        nargs="?",
        type=Path,
        default=ROOT / "config/config.yaml",
        metavar="STUDY",
        help="study file (default: the paper's)",
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="files or stages to make, as Snakemake takes them, e.g. results/table2.csv (default: all tables)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        help="GPUs, or without any, jobs that run a model at once (default: 8 in a study of scale paper, else 1)",
    )
    parser.add_argument(
        "--staging",
        action="store_true",
        help="ask the hub which files will be downloaded, their size and licence, and whether they fit the disk",
    )
    parser.add_argument(
        "--measured-by",
        type=Path,
        metavar="STUDY",
        help="another study, made on the same machine, whose finished jobs show the constants",
    )
    parser.add_argument(
        "--assume",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="other assumptions, e.g. mfu=0.3 tokens_per_sample=700",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate. Returns the exit status: 0, 1 if the disk is too small, 2 for mistakes in what was given."""
    from llmfusion.study.errors import StudyError

    try:
        return _estimate(arguments)
    except (StudyError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _estimate(arguments: argparse.Namespace) -> int:
    from llmfusion.reporting.estimate import check_disk, constant_lines, estimate_of, table_lines, unknown_lines
    from llmfusion.reporting.machine import assumptions_for
    from llmfusion.study.snakemake import addresses_of, checked
    from llmfusion.study.workload import Workload

    study, graph = checked(arguments.study)
    assumed = assumptions_for(study.scale).parse(arguments.assume)
    targets = addresses_of(graph, arguments.targets) if arguments.targets else None
    measured_by = Workload(*checked(arguments.measured_by), assumed) if arguments.measured_by else None
    estimate, counts = estimate_of(study, graph, assumed, targets, measured_by)
    status = 0
    if arguments.staging:
        status, sizes = _print_staging(study, estimate.left)
        estimate, counts = estimate_of(study, graph, assumed, targets, measured_by, sizes)
    gpus = estimate.devices if arguments.gpus is None else arguments.gpus
    lines = table_lines(estimate, estimate.wall_hours(gpus), gpus)
    done = len(estimate.jobs) - len(estimate.left)
    print(f"{study.title}: {len(estimate.jobs)} jobs, {done} of them done\n")
    print("\n".join([*lines, *constant_lines(assumed, counts)]))
    print("".join(f"\n{line}" for line in unknown_lines(estimate)), end="", flush=True)
    fits, message = check_disk(estimate.workload.directory, estimate.disk_need(estimate.trainings_at_once(gpus)))
    if fits:
        print(f"\ndisk: {message}")
        return status
    print(f"\ndisk: {message}; nothing was started", file=sys.stderr)
    return 1


def _print_staging(study: "Study", addresses: Iterable[str]) -> tuple[int, "dict[str, ModelSize]"]:
    """Print what will be downloaded. Returns the exit status, and the models' sizes as the hub tells them."""
    from llmfusion.reporting.staging import plan_staging

    plan = plan_staging(study, addresses)
    print("\n".join(plan.lines()))
    for sentence in plan.lacking:
        print(
            f"staging: {sentence}: free some, or set HF_HOME or the study's 'directory' to a larger place",
            file=sys.stderr,
        )
    return (1 if plan.lacking or plan.problems else 0), plan.sizes
