"""Walk from a result (``results/table2.csv``, a score, a manifest) to every dataset and model hash behind it.

Every manifest and every file on the way is hashed anew, and every artifact must have been made from exactly the inputs that
lie there now. All mismatches are named; exit status 1 if there is one. Licences of all inputs are listed at the end.
"""

import argparse
import sys
from pathlib import Path

from llmfusion.artifacts.verification import Walk
from llmfusion.errors import UserError, require
from llmfusion.study.addresses import address_of, results_index
from llmfusion.study.kinds import kind_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results to verify."""
    parser.add_argument(
        "targets", nargs="+", type=Path, metavar="FILE", help="a table, a score or a manifest: results/table2.csv, ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify the given targets. Returns the exit status."""
    return max(_verify(target) for target in arguments.targets)


def _verify(target: Path) -> int:
    try:
        require(target.exists(), f"{target}: is not there")
        root = Path(*target.parts[: results_index(target)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    walk = Walk(root)
    walk.visit(address_of(target))
    for line in dict.fromkeys(walk.wrong):
        print(f"mismatch: {line}", file=sys.stderr)
    sources = {address: found for address, found in walk.found.items() if kind_of(address).is_source}
    for address, artifact in sorted(sources.items()):
        print(f"{address}  {artifact.sha256[:16]}  licence: {artifact.facts.get('license', 'NOT DECLARED')}")
    verdict = f"{len(set(walk.wrong))} MISMATCHES" if walk.wrong else "all match"
    print(
        f"{target}: {len(walk.found)} artifacts, {walk.bytes / 1e6:,.1f} MB hashed, {len(sources)} datasets, task sets and base models: {verdict}"
    )
    return 1 if walk.wrong else 0
