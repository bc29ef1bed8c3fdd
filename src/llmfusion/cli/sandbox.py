"""Run untrusted solutions in a sandbox, one verdict a line.

Verdicts are kept in OUT.jsonl.partial as they come; the same command goes on from there after an interruption.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError, require
from llmfusion.evaluation.judge import NOT_SUPPORTED
from llmfusion.evaluation.verdict_log import resumed_verdicts
from llmfusion.io.files import write_file
from llmfusion.io.jsonl import read_jsonl

FIELDS = ("task_id", "prompt", "completion", "test", "entry_point")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, jobs and the time limit."""
    parser.add_argument("tasks", type=Path, metavar="IN.jsonl", help=f"lines with {', '.join(FIELDS)}")
    parser.add_argument(
        "verdicts",
        type=Path,
        metavar="OUT.jsonl",
        help="lines with task_id, passed, reason, and detail where it failed",
    )
    add_limits(parser)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Options of commands that run programs."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="sandboxes at a time (default: one a core)")
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="seconds a program may take to load and for all calls together"
    )


def check_arguments(arguments: argparse.Namespace, source: Path, target: Path) -> None:
    """Raise :class:`UserError` for limits that cannot be meant, a missing file, and a missing folder for the result."""
    timeout = arguments.timeout
    require(arguments.jobs > 0, f"--jobs {arguments.jobs}: give at least 1")
    require(0 < timeout <= 3600, f"--timeout {timeout:g}: give more than 0 and at most 3600 seconds")
    require(source.is_file(), f"{source}: is not there")
    require(target.parent.is_dir(), f"{target.parent}: is no folder; make it first")


def run(arguments: argparse.Namespace) -> int:
    """Read tasks, write verdicts. Returns the exit status."""
    try:
        check_arguments(arguments, arguments.tasks, arguments.verdicts)
        tasks = list(read_jsonl(arguments.tasks, _check))
        log = log_beside(arguments.verdicts)
        judged = list(resumed_verdicts(tasks, arguments.jobs, arguments.timeout, log))
        write_lines(arguments.verdicts, judged)
        log.unlink(missing_ok=True)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(verdict['passed'] for verdict in judged)} of {len(judged)} passed")
    report_unsupported([verdict["reason"] for verdict in judged])
    return 0


def log_beside(path: Path) -> Path:
    """Where verdicts are kept as they come until ``path`` is written; a run that was killed goes on from it."""
    return path.with_name(f"{path.name}.partial")


def report_unsupported(reasons: list[str]) -> None:
    """Say on stderr how many tests could not be run here."""
    unsupported = [reason for reason in reasons if reason.startswith(NOT_SUPPORTED)]
    if unsupported:
        count = f"{len(unsupported)} of {len(reasons)} tests"
        print(f"warning: {count} cannot be run here, which says nothing about the programs: {unsupported[0]}",
              file=sys.stderr)  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_file(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def _check(task: dict[str, Any], number: int) -> str | None:
    if missing := [field for field in FIELDS if field not in task]:
        return f"{', '.join(missing)} missing"
    if not_text := [field for field in FIELDS[1:] if not isinstance(task[field], str)]:
        return f"{', '.join(not_text)} must be text"
    return None
