"""``python -m llmfusion.sandbox IN.jsonl OUT.jsonl``: run untrusted solutions, one verdict a line."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from llmfusion.artifacts import require, write_file
from llmfusion.data.samples import read_jsonl
from llmfusion.errors import UserError
from llmfusion.evaluation.sandbox import verdicts

FIELDS = ("task_id", "prompt", "completion", "test", "entry_point")


def main(arguments: list[str] | None = None) -> int:
    """Read tasks, write verdicts. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmfusion.sandbox", description="Run untrusted solutions in a sandbox.")
    parser.add_argument("tasks", type=Path, metavar="IN.jsonl", help=f"lines with {', '.join(FIELDS)}")
    parser.add_argument("verdicts", type=Path, metavar="OUT.jsonl", help="lines with task_id, passed, reason")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="sandboxes at a time (default: one a core)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a program may take to load and for all calls together")
    given = parser.parse_args(arguments)
    try:
        require(given.jobs > 0, f"--jobs {given.jobs}: give at least 1")
        require(0 < given.timeout <= 3600, f"--timeout {given.timeout:g}: give more than 0 and at most 3600 seconds")
        require(given.tasks.is_file(), f"{given.tasks}: is not there")
        require(given.verdicts.parent.is_dir(), f"{given.verdicts.parent}: is no folder; make it first")
        tasks = list(read_jsonl(given.tasks, lambda row, number: None))  # whatever the file is called
        for number, task in enumerate(tasks, 1):
            _check(task, f"{given.tasks}, line {number}")
        found = list(verdicts(tasks, given.jobs, given.timeout))
        write_file(given.verdicts, "".join(json.dumps(v, sort_keys=True) + "\n" for v in found).encode())
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


if __name__ == "__main__":
    sys.exit(main())
