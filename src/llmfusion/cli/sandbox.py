"""Run untrusted solutions in a sandbox, one verdict a line."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from llmfusion.data.samples import read_jsonl
from llmfusion.errors import UserError, require
from llmfusion.evaluation.sandbox import verdicts
from llmfusion.io.files import write_file

FIELDS = ("task_id", "prompt", "completion", "test", "entry_point")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, jobs and the time limit."""
    parser.add_argument("tasks", type=Path, metavar="IN.jsonl", help=f"lines with {', '.join(FIELDS)}")
    parser.add_argument("verdicts", type=Path, metavar="OUT.jsonl", help="lines with task_id, passed, reason")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="sandboxes at a time (default: one a core)"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="seconds a program may take to load and for all calls together"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read tasks, write verdicts. Returns the exit status."""
    try:
        require(arguments.jobs > 0, f"--jobs {arguments.jobs}: give at least 1")
        require(
            0 < arguments.timeout <= 3600, f"--timeout {arguments.timeout:g}: give more than 0 and at most 3600 seconds"
        )
        require(arguments.tasks.is_file(), f"{arguments.tasks}: is not there")
        require(arguments.verdicts.parent.is_dir(), f"{arguments.verdicts.parent}: is no folder; make it first")
        tasks = list(read_jsonl(arguments.tasks, lambda row, number: None))  # whatever the file is called
        for number, task in enumerate(tasks, 1):
            _check(task, f"{arguments.tasks}, line {number}")
        found = list(verdicts(tasks, arguments.jobs, arguments.timeout))
        write_file(arguments.verdicts, "".join(json.dumps(v, sort_keys=True) + "\n" for v in found).encode())
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(v['passed'] for v in found)} of {len(found)} passed")
    return 0


def _check(task: Any, place: str) -> None:
    missing = [f for f in FIELDS if not isinstance(task, dict) or f not in task]
    require(not missing, f"{place}: {', '.join(missing)} missing")
    wrong = [f for f in FIELDS[1:] if not isinstance(task[f], str)]
    require(not wrong, f"{place}: {', '.join(wrong)} must be text")
