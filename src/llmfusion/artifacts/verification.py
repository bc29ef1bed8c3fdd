"""Walk from a table (or any artifact) to every dataset and model hash.

Every manifest and every file on the way is hashed anew, and every artifact must have been made from exactly the inputs that
lie there now. All mismatches are collected.
"""

from dataclasses import dataclass, field
from pathlib import Path

from llmfusion.artifacts import store
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.study.addresses import manifest_of, output_of


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
        path = manifest_of(self.root / output_of(address))
        try:
            artifact = store.read(path, memory=None)
        except UserError as error:
            self.wrong.append(str(error))
            return None
        self.found[address] = artifact
        self.bytes += sum(entry["size"] for entry in artifact.manifest["files"].values())
        for source, expected in artifact.manifest["inputs"].items():
            made_from = self.visit(source)
            if made_from is not None and made_from.sha256 != expected:
                self.wrong.append(
                    f"{path}: was made from another {source} (manifest {expected[:16]}, now {made_from.sha256[:16]}); make it again"
                )
        return artifact
