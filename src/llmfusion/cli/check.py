"""Check studies: all mistakes at once, with file and line; nothing is started. Exit status 2 on mistakes."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The studies."""
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="study files, e.g. config/mini.yaml")


def run(arguments: argparse.Namespace) -> int:
    """Check all. Returns the exit status: 0, or 2 for mistakes."""
    return max(_check(file) for file in arguments.studies)


def _check(file: str) -> int:
    from llmfusion.study.errors import StudyError
    from llmfusion.study.hints import hints
    from llmfusion.study.snakemake import checked

    try:
        study, graph = checked(file)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(getattr(study.models, kind))} {kind}" for kind in ("base", "trained", "merged"))
    counts += f" models, {len(study.tasks)} tasks, {len(graph.artifacts)} artifacts"
    print(f"{file}: {study.scale} study, {counts}: no mistakes")
    for hint in hints(study):
        print(f"{file}: note: {hint}")
    return 0
