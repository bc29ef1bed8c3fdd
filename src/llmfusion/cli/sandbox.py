"""Run untrusted solutions in a sandbox, one verdict a line."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError, require
from llmfusion.evaluation.sandbox import verdicts
from llmfusion.io.files import write_file
from llmfusion.io.jsonl import read_jsonl

FIELDS = ("task_id", "prompt", "completion", "test", "entry_point")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, jobs and the time limit."""
    parser.add_argument("tasks", type=Path, metavar="IN.jsonl", help=f"lines with {', '.join(FIELDS)}")
    parser.add_argument("verdicts", type=Path, metavar="OUT.jsonl", help="lines with task_id, passed, reason")
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
        judged = list(verdicts(tasks, arguments.jobs, arguments.timeout))
        write_lines(arguments.verdicts, judged)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(verdict['passed'] for verdict in judged)} of {len(judged)} passed")
    return 0


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_file(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def _check(task: dict[str, Any], number: int) -> str | None:
    if missing := [field for field in FIELDS if field not in task]:
        return f"{', '.join(missing)} missing"
    if not_text := [field for field in FIELDS[1:] if not isinstance(task[field], str)]:
        return f"{', '.join(not_text)} must be text"
    return None
