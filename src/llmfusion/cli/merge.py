"""Merge checkpoints that were fine-tuned from one pivot, outside a study.

Exit status 2 for wrong options, checkpoints that do not fit together and a full disk.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmfusion.errors import UserError, require

if TYPE_CHECKING:
    from llmfusion.merging.plan import MergePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The method, the checkpoints and the folder to write."""
    from llmfusion.study.plugins import plugin_names

    parser.add_argument("--method", required=True, help=", ".join(plugin_names("llmfusion.merging.methods")))
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
    from llmfusion.merging.by_hand import check_options, merge_folders
    from llmfusion.merging.plan import plan_merge

    try:
        require(
            arguments.threads is None or arguments.threads > 0, f"--threads {arguments.threads}: expected 1 or more"
        )
        options = check_options(arguments.method, arguments.set, len(arguments.models))
        require(not arguments.out.exists(), f"{arguments.out}: exists already; take another name or move it away")
        for folder in (arguments.pivot, *arguments.models):
            require(folder.is_dir(), f"{folder}: is no folder")
        plan = plan_merge(arguments.pivot, arguments.models, options)
        for remark in plan.matching.remarks:
            print(f"note: {remark}", file=sys.stderr)
        if arguments.dry_run:
            print(_description(plan, arguments))
        else:
            merge_folders(plan, arguments.out, arguments.threads)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the tensors that are missing", file=sys.stderr)
        return 130
    return 0


def _description(work: "MergePlan", arguments: argparse.Namespace) -> str:
    """What a merge would do, from headers."""
    from llmfusion.artifacts.job import format_bytes
    from llmfusion.merging.plan import default_threads
    from llmfusion.study.schema.base import dump

    threads = arguments.threads or default_threads()
    place = next(folder for folder in arguments.out.resolve().parents if folder.exists())
    merged = [part for part in work.parts if part.models]
    return "\n".join(
        [
            f"{arguments.method} of {len(arguments.models)} models over {arguments.pivot}, options: {dump(work.options, 'method', 'pivot', 'parents') or 'all defaults'}",
            f"{len(merged)} tensors with {work.values:,} values are merged, {len(work.parts) - len(merged)} copied from the pivot",
            f"reads {work.read / 1e9:,.2f} GB, writes {work.written / 1e9:,.2f} GB in {len(work.files)} files to {arguments.out}",
            f"{shutil.disk_usage(place).free / 1e9:,.1f} GB are free there",
            f"about {work.seconds(threads):,.0f} s on {threads} threads, {format_bytes(work.memory(threads))} of memory",
            "nothing was written (--dry-run)",
        ]
    )
