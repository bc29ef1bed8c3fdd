"""Grade stored answers, of any model and asked by anybody, one verdict a line.

Lines of IN.jsonl hold ``item``, an object with the fields that the format needs, and ``answer``, the text of the
answer. Lines of OUT.jsonl hold the same ``item``, ``right``, and ``extracted``: what counted of the answer, a letter, a
number or a program; where answers are programs, also the ``reason`` of the verdict. Grading is that of a study's
scores. Exit status 1 for files that cannot be used, 2 for an unknown format.
"""

import argparse
import sys
from pathlib import Path

from llmfusion.cli.sandbox import add_limits, check_arguments, log_beside, report_unsupported, write_lines
from llmfusion.errors import UserError
from llmfusion.evaluation.task_format import Item, TaskFormat, load_format, task_formats
from llmfusion.evaluation.verdicts import Verdict, grade_answers
from llmfusion.io.jsonl import Check, Row, read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The format, files, and the limits of programs."""
    needs = "; ".join(f"{name}: {', '.join(one.item_fields)}" for name, one in task_formats().items())
    parser.add_argument("format", metavar="FORMAT", help=f"task format, and the fields that its items need: {needs}")
    parser.add_argument("answers", type=Path, metavar="IN.jsonl", help="lines with item and answer")
    parser.add_argument("verdicts", type=Path, metavar="OUT.jsonl", help="lines with item, right and extracted")
    add_limits(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read answers, write verdicts. Returns the exit status."""
    try:
        task_format = load_format(arguments.format)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        check_arguments(arguments, arguments.answers, arguments.verdicts)
        rows = list(read_jsonl(arguments.answers, _check(arguments.format, task_format)))
        items = [row["item"] for row in rows]
        answers = [row["answer"] for row in rows]
        log = log_beside(arguments.verdicts)
        graded = grade_answers(task_format, items, answers, arguments.jobs, arguments.timeout, log)
        write_lines(arguments.verdicts, [_told(task_format, i, v) for i, v in zip(items, graded, strict=True)])
        log.unlink(missing_ok=True)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(verdict.right for verdict in graded)} of {len(graded)} right")
    report_unsupported([verdict.reason for verdict in graded])
    return 0


def _told(task_format: TaskFormat, item: Item, verdict: Verdict) -> Row:
    row = {"item": item, "right": verdict.right, "extracted": verdict.extracted}
    return {**row, "reason": verdict.reason} if task_format.runs_programs else row


def _check(name: str, task_format: TaskFormat) -> Check:
    """A function that says what keeps a line from being graded, or None."""

    def check(row: Row, number: int) -> str | None:
        if missing := [key for key in ("item", "answer") if key not in row]:
            return f"{' and '.join(missing)} missing; a line holds item (an object) and answer (text)"
        if not isinstance(row["answer"], str):
            return f"answer: expected text, found {row['answer']!r:.60}"
        if not isinstance(row["item"], dict):
            return f"item: expected an object with the item's fields, found {row['item']!r:.60}"
        problem = task_format.item_problem(name, row["item"])
        return None if problem is None else f"item: {problem}"

    return check
