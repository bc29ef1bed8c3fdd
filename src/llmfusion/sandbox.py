"""``python -m llmfusion.sandbox IN.jsonl OUT.jsonl``: run untrusted solutions, one verdict a line."""

import argparse
import json
import os
import sys
from pathlib import Path

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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="sandboxes at a time")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a task may take in all")
    given = parser.parse_args(arguments)
    try:
        require(given.tasks.is_file(), f"{given.tasks}: is not there")
        require(given.verdicts.parent.is_dir(), f"{given.verdicts.parent}: is no folder; make it first")
        tasks = list(read_jsonl(given.tasks))
        for number, task in enumerate(tasks, 1):
            missing = [f for f in FIELDS if not isinstance(task, dict) or f not in task]
            require(not missing, f"{given.tasks}, line {number}: {', '.join(missing)} missing")
        found = list(verdicts(tasks, given.jobs, given.timeout))
        write_file(given.verdicts, "".join(json.dumps(v, sort_keys=True) + "\n" for v in found).encode())
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(v['passed'] for v in found)} of {len(found)} passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
