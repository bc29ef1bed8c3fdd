"""Walk from a result (``results/table2.csv``, a score, a manifest) to every dataset and model hash behind it.

Every manifest and every file on the way is hashed anew, and every artifact must have been made from exactly the
inputs that are there now. All mismatches are named; exit status 1 if there is one. Licences of all inputs are listed
at the end.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmfusion.errors import UserError, require

if TYPE_CHECKING:
    from llmfusion.artifacts.store import Artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results to verify."""
    parser.add_argument(
        "targets", nargs="+", type=Path, metavar="FILE", help="a table, a score or a manifest: results/table2.csv, ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify the given targets. Returns the exit status: 0, 1 for mismatches, 2 for what is no result of a study."""
    return max(_verify(target) for target in arguments.targets)


def _verify(target: Path) -> int:
    from llmfusion.artifacts.verification import Verification
    from llmfusion.study.addresses import address_of, results_index
    from llmfusion.study.kinds import is_source

    try:
        require(target.exists(), f"{target}: is not there")
        directory = Path(*target.parts[: results_index(target)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    walk = Verification(directory)
    walk.verify(address_of(target))
    mismatches = list(dict.fromkeys(walk.mismatches))
    for line in mismatches:
        print(f"mismatch: {line}", file=sys.stderr)
    sources = {address: artifact for address, artifact in walk.artifacts.items() if is_source(address)}
    for address, artifact in sorted(sources.items()):
        print(f"{address}  {artifact.sha256[:16]}  licence: {_licence(address, artifact)}")
    counts = f"{len(walk.artifacts)} artifacts, {walk.bytes_hashed / 1e6:,.1f} MB hashed"
    verdict = f"{len(mismatches)} MISMATCHES" if mismatches else "all match"
    print(f"{target}: {counts}, {len(sources)} datasets, task sets and base models: {verdict}")
    return int(bool(mismatches))


def _licence(address: str, artifact: "Artifact") -> str:
    """The licence that a source states, or the licences behind a base model that was trained here."""
    from llmfusion.artifacts.licences import licences_of

    try:
        return ", ".join(sorted(set(licences_of(address, artifact).values())))
    except UserError:
        return "NOT DECLARED"
