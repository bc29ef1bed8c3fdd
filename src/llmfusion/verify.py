"""``python -m llmfusion.verify results/table2.csv``: walk from a table (or any artifact) to every dataset and model hash.

Every manifest and every file on the way is hashed anew, and every artifact must have been made from exactly the inputs that
lie there now. All mismatches are named; exit status 1 if there is one. Licences of all inputs are listed at the end.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from llmfusion import artifacts
from llmfusion.artifacts import Artifact, require
from llmfusion.config.plan import output_of
from llmfusion.errors import UserError


@dataclass
class Walk:
    """What was found from one target: artifacts by address, mismatches, bytes hashed."""

    root: Path
    found: dict[str, Artifact] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    bytes: int = 0

    def visit(self, address: str) -> Artifact | None:
        """Verify an artifact and everything it was made from; None if it cannot be read."""
        if address in self.found:
            return self.found[address]
        path = artifacts.manifest_of(self.root / output_of(address))
        try:
            artifact = artifacts.read(path, memory=None)
        except UserError as error:
            self.wrong.append(str(error))
            return None
        self.found[address] = artifact
        self.bytes += sum(entry["size"] for entry in artifact.manifest["files"].values())
        for source, expected in artifact.manifest["inputs"].items():
            made_from = self.visit(source)
            if made_from is not None and made_from.sha256 != expected:
                self.wrong.append(f"{path}: was made from another {source} (manifest {expected[:16]}, now {made_from.sha256[:16]}); make it again")
        return artifact


def main(arguments: list[str] | None = None) -> int:
    """Verify the given targets. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmfusion.verify", description="Walk from a result to every hash behind it.")
    parser.add_argument("targets", nargs="+", type=Path, metavar="FILE", help="a table, a score or a manifest: results/table2.csv, ...")
    given = parser.parse_args(arguments)
    return max(_verify(target) for target in given.targets)


def _verify(target: Path) -> int:
    try:
        require(target.exists(), f"{target}: is not there")
        root = Path(*target.parts[: artifacts.results_of(target)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    walk = Walk(root)
    walk.visit(artifacts.address_of(target))
    for line in dict.fromkeys(walk.wrong):
        print(f"mismatch: {line}", file=sys.stderr)
    sources = {a: f for a, f in walk.found.items() if a.startswith(("data/dataset/", "data/tasks/", "models/base/"))}
    for address, artifact in sorted(sources.items()):
        print(f"{address}  {artifact.sha256[:16]}  licence: {artifact.facts.get('license', 'NOT DECLARED')}")
    verdict = f"{len(set(walk.wrong))} MISMATCHES" if walk.wrong else "all match"
    print(f"{target}: {len(walk.found)} artifacts, {walk.bytes / 1e6:,.1f} MB hashed, {len(sources)} datasets, task sets and base models: {verdict}")
    return 1 if walk.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
