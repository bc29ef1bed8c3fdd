"""Merge checkpoints that were fine-tuned from one pivot, outside a study.

Exit status 2 for wrong options, checkpoints that do not fit together and a full disk.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmfusion.errors import UserError, printable, require

if TYPE_CHECKING:
    from llmfusion.merging.plan import MergePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, the checkpoints and the folder to write."""
    from llmfusion.study.merge_methods import method_names, method_summary

    names = method_names()
    width = max(map(len, names))
    parser.epilog = "\n".join(["methods:", *(f"  {name:{width}}  {method_summary(name)}" for name in names)])
    parser.add_argument("--method", required=True, metavar="NAME", help="how: one of the methods below")
    parser.add_argument("--pivot", required=True, type=Path, help="folder of the model all others started from")
    parser.add_argument("--models", required=True, nargs="+", type=Path, help="folders of the models to merge")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options of the method, e.g. weight=0.5,0.5",
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="tensors merged at a time; default: OMP_NUM_THREADS, else all cores"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and say what would be done; writes nothing")


def run(arguments: argparse.Namespace) -> int:
    """Merge, or with ``--dry-run`` describe the merge. Returns the exit status."""
    from llmfusion.study.plugins import PluginError

    try:
        plan = _plan(arguments)
        for remark in plan.matching.remarks:
            print(f"note: {remark}", file=sys.stderr)
        if arguments.dry_run:
            print(_description(plan, arguments))
        else:
            _merge(plan, arguments)
    except (UserError, PluginError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}; may you read and write there?" if error.filename else error
        print(f"error: {printable(reason)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the tensors that are missing", file=sys.stderr)
        return 130
    return 0


def _plan(arguments: argparse.Namespace) -> "MergePlan":
    """The checked merge."""
    from llmfusion.merging.options import parse_options
    from llmfusion.merging.plan import plan_merge

    threads = arguments.threads
    require(threads is None or threads > 0, f"--threads {threads}: expected 1 or more")
    options = parse_options(arguments.method, arguments.set, len(arguments.models))
    require(not arguments.out.exists(), f"{arguments.out}: exists already; take another name or move it away")
    for folder in (arguments.pivot, *arguments.models):
        require(folder.is_dir(), f"{folder}: is no folder")
    return plan_merge(arguments.pivot, arguments.models, options)


def _merge(plan: "MergePlan", arguments: argparse.Namespace) -> None:
    """Merge and print what came of it."""
    from llmfusion.merging.by_hand import merge_folders
    from llmfusion.merging.report import summary

    started = time.monotonic()
    facts = merge_folders(plan, arguments.out, arguments.threads, progress_line(started))
    if (dtype := plan.options.out_dtype) != "pivot":
        load_hint = f"load with dtype={dtype!r} to have the weights as they are stored"
        print(f"note: config.json is the pivot's; {load_hint}", file=sys.stderr)
    if "warning" in facts:
        print(f"warning: {facts['warning']}", file=sys.stderr)
    print(f"{arguments.out}: {summary(facts)} in {time.monotonic() - started:.1f} s")


def progress_line(started: float) -> Callable[[int, int], None] | None:
    """A callback that keeps one line on a terminal up to date: share done, and bytes read and written a second.

    None where standard error is no terminal. ``started``: when the merge began, on the monotonic clock.
    """
    if not sys.stderr.isatty():
        return None

    def update(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        line = f"\r{done / total:4.0%} of {total / 1e9:,.2f} GB, {rate / 1e9:.2f} GB/s"
        print(line, end="\n" if done == total else "", file=sys.stderr, flush=True)

    return update


def _description(plan: "MergePlan", arguments: argparse.Namespace) -> str:
    """What a merge would do, from headers."""
    from llmfusion.io.files import format_bytes
    from llmfusion.merging.plan import default_threads
    from llmfusion.study.schema.base import dump

    threads = arguments.threads or default_threads()
    disk = next(folder for folder in Path(os.path.realpath(arguments.out)).parents if folder.exists())
    options = dump(plan.options, "method", "pivot", "parents") or "all defaults"
    memory = format_bytes(plan.memory(threads))
    merged = sum(bool(tensor.models) for tensor in plan.tensors)
    return "\n".join(
        [
            f"{arguments.method} of {len(arguments.models)} models over {arguments.pivot}, options: {options}",
            f"{merged} tensors with {plan.merged_values:,} values are merged, "
            f"{len(plan.tensors) - merged} copied from the pivot",
            f"reads {plan.bytes_read / 1e9:,.2f} GB, "
            f"writes {plan.bytes_written / 1e9:,.2f} GB in {len(plan.files)} files to {arguments.out}",
            f"{shutil.disk_usage(disk).free / 1e9:,.1f} GB are free there",
            f"about {plan.seconds(threads):,.0f} s on {threads} threads, {memory} of memory",
            "nothing was written (--dry-run)",
        ]
    )
