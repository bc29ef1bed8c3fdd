"""Walk from a table (or any artifact) to every dataset and model hash.

Every manifest and every file on the way is hashed anew, and every artifact must have been made from exactly the
inputs that are there now. All mismatches are collected.
"""

from dataclasses import dataclass, field
from pathlib import Path

from llmfusion.artifacts import store
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.study.addresses import manifest_of, output_of


@dataclass
class Verification:
    """What verifying artifacts of the study in ``directory`` has shown so far."""

    directory: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # by address
    mismatches: list[str] = field(default_factory=list)
    bytes_hashed: int = 0

    def verify(self, address: str) -> Artifact | None:
        """Verify an artifact and everything it was made from; None if it cannot be read."""
        if address in self.artifacts:
            return self.artifacts[address]
        path = manifest_of(self.directory / output_of(address))
        try:
            artifact = store.read(path, memory=None)
        except UserError as error:
            self.mismatches.append(str(error))
            return None
        self.artifacts[address] = artifact
        self.bytes_hashed += sum(entry["size"] for entry in artifact.manifest["files"].values())
        for source, expected in artifact.manifest["inputs"].items():
            made_from = self.verify(source)
            if made_from is not None and made_from.sha256 != expected:
                hashes = f"manifest {expected[:16]}, now {made_from.sha256[:16]}"
                self.mismatches.append(f"{path}: was made from another {source} ({hashes}); make it again")
        return artifact
