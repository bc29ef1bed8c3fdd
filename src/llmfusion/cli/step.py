"""Make one artifact: what the Snakemake rules call, and what the first line of each log reproduces."""

import argparse
import os
import shlex
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

from llmfusion.cli import warm
from llmfusion.errors import UserError
from llmfusion.io import job_log
from llmfusion.io.redaction import redacted
from llmfusion.study.plugins import plugin_names

STEPS = plugin_names("llmfusion.steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The rule's name and what Snakemake knows of the job."""
    parser.add_argument("step", choices=STEPS, metavar="STEP", help=f"name of the rule: {', '.join(STEPS)}")
    parser.add_argument(
        "--spec",
        required=True,
        help="what to make: canonical JSON, as the study's graph gives it; -: standard input, which has no limit",
    )
    parser.add_argument("--out", required=True, type=Path, help="the declared output, results/.../manifest.json")
    parser.add_argument("--inputs", nargs="*", default=[], help="the declared inputs")
    parser.add_argument(
        "--log", type=Path, default=None, help="where to write what the step prints once it is the one that works"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="time limit of this job from its start; a training saves before it ends",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the artifact, in this process or in a fork of ``llmfusion warm``. Returns the exit status: 0, or 1.

    What the user can mend is reported in one line, anything else with its traceback.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        if warm.ADDRESS in os.environ:
            return warm.ask(sys.argv[1:])
        _make(arguments)
    except UserError as error:
        job_log.report(f"error: {redacted(str(error))}", arguments.log)
        return 1
    except Exception:
        job_log.report(redacted(traceback.format_exc()), arguments.log)
        return 1
    return 0


def _stop(number: int, _: object) -> None:
    """End by a signal, Ctrl-C included, with what is half made removed: the removal is not interrupted once more."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _make(arguments: argparse.Namespace) -> None:
    from llmfusion.artifacts.job import Request, explain_full_disk, run_job
    from llmfusion.io.logs import log_to_stdout
    from llmfusion.io.progress_bars import show_only_in_terminals

    log_to_stdout()
    show_only_in_terminals()
    spec = arguments.spec
    with explain_full_disk(arguments.out):  # the log may lie on it, too
        if spec == "-":
            with open(0, encoding="utf-8", closefd=False) as file:
                spec = file.read().removesuffix("\n")  # which bash adds to a here-string
        build = import_module(f"llmfusion.steps.{arguments.step}").build
        request = Request(
            spec, arguments.out, arguments.inputs, arguments.minutes, arguments.log, _command(arguments.spec, spec)
        )
        run_job(request, build)


def _command(given: str, spec: str) -> str:
    """The bash command that makes this artifact again."""
    command = shlex.join(["python", "-m", "llmfusion", *sys.argv[1:]])
    return f"{command} <<< {shlex.quote(spec)}" if given == "-" else command
