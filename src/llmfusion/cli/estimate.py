"""Jobs, GPU-hours, wall time, disk and GPU memory of a study, before anything is paid for.

Constants come from named assumptions (``--assume mfu=0.3``), and from what jobs that have finished took:
the study's own, or with ``--measured-by`` those of another study on the same machine. Exit status 1 if the disk will
not hold it.
"""

import argparse
import sys
from pathlib import Path

from llmfusion import ROOT


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
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that work at once (default: 8)")
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
    from llmfusion.reporting.estimate import Estimate, check_disk, constant_lines, table_lines
    from llmfusion.reporting.measured import fit_coefficients
    from llmfusion.study.errors import StudyError
    from llmfusion.study.snakemake import checked
    from llmfusion.study.workload import Assumptions, Workload, assumed_seconds

    try:
        assumed = Assumptions.parse(arguments.assume)
        workload = Workload(*checked(arguments.study), assumed)
        measured_by = Workload(*checked(arguments.measured_by), assumed) if arguments.measured_by else workload
        coefficients, counts = fit_coefficients(assumed_seconds(assumed), measured_by)
        estimate = Estimate(workload, coefficients)
        wall_hours = estimate.wall_hours(arguments.gpus)
    except (StudyError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    done = len(estimate.jobs) - len(estimate.left)
    print(f"{workload.study.title}: {len(estimate.jobs)} jobs, {done} of them done\n")
    print("\n".join(table_lines(estimate, wall_hours, arguments.gpus)))
    print("\n".join(constant_lines(assumed, counts, arguments.assume)))
    fits, message = check_disk(workload.directory, *estimate.bytes_left(arguments.gpus))
    if fits:
        print(f"\ndisk: {message}")
        return 0
    print(f"\ndisk: {message}; nothing was started", file=sys.stderr)
    return 1
