"""Write the same study several times over, for error bars.

Every seed is a replicate with its own noise, mix, order and projectors; replicates share ``--sets`` sets of base
models, which are trained anew for each set (models that are staged are shared by all). The written study has one
table, ``seeds``: a row of the first table is the mean over its replicates, with the paired difference to the
reference.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml


class _Plain(yaml.SafeDumper):
    """YAML without anchors for what happens to be equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, the file to write, seeds and sets."""
    parser.add_argument("study", type=Path, metavar="STUDY")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--sets", type=int, default=1, help="sets of base models, trained anew for each")


def run(arguments: argparse.Namespace) -> int:
    """Write a replicated study. Returns the exit status: 0, or 2 for mistakes in what was given."""
    from llmfusion.study.errors import StudyError
    from llmfusion.study.snakemake import checked

    out = arguments.out
    try:
        if out.resolve() == arguments.study.resolve():
            raise ValueError(f"{out} is the study itself; name another file to write")
        text = _text(arguments)
        out.write_text(text)
        _, graph = checked(out)
    except (StudyError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {len(graph.artifacts)} artifacts")
    return 0


def _text(arguments: argparse.Namespace) -> str:
    """The replicated study as YAML, under the command that made it."""
    from llmfusion.study.load import read_study
    from llmfusion.study.replicate import replicated

    seeds = arguments.seeds
    sets = arguments.sets
    study = read_study(arguments.study).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    copies = replicated(study, seeds, sets) | {
        "title": f"{study['title']}, {len(seeds)} seeds over {sets} set{'s' * (sets > 1)} of source models",
        "directory": f"{study['directory']}-seeds",
    }
    words = f"{arguments.study.name} --seeds {' '.join(map(str, seeds))} --sets {sets}"
    body = yaml.dump(copies, Dumper=_Plain, sort_keys=False, width=200, default_flow_style=None)
    return f"# Written by: llmfusion replicate {words}\n{body}"
