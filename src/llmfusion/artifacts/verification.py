"""Walk from a table (or any artifact) to every dataset and model hash.

Every manifest and every file on the way is hashed anew, every artifact must have been made from exactly the inputs that
are there now, and its provenance must be that of its manifest. What lies in ``results/`` and belongs to no artifact is
found, too. All mismatches are collected.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfusion.artifacts import store
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import DamagedError, UserError
from llmfusion.io.digests import canonical, digest, fingerprint_of
from llmfusion.io.files import JSON_LIMIT, plain_file, read_regular
from llmfusion.study.addresses import costs_of, manifest_of, output_of, provenance_of

REPORTS = ("cost.csv", "report.html")  # in results/: what jobs took, and the page of `llmfusion report`; no artifacts
EARLIER = {"host", "versions", "started"}  # what a record of provenance held before it named its manifest
NOT_OURS = (".nfs", ".draft", ".old", ".tmp")  # in names of hidden files: of file systems, and of jobs that are running


@dataclass
class Verification:
    """What verifying artifacts of the study in ``directory`` has shown so far."""

    directory: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # by address
    mismatches: list[str] = field(default_factory=list)
    bytes_hashed: int = 0
    looked_at: set[Path] = field(default_factory=set)  # manifests, damaged ones included

    def verify(self, address: str) -> Artifact | None:
        """Verify an artifact and everything it was made from; None if it cannot be read."""
        if address in self.artifacts:
            return self.artifacts[address]
        output = self.directory / output_of(address)
        path = manifest_of(output)
        self.looked_at.add(path)
        try:
            artifact = store.read(path, memory=None)
        except UserError as error:
            self.mismatches.append(str(error))
            return None
        self.artifacts[address] = artifact
        self.bytes_hashed += sum(entry["size"] for entry in artifact.manifest["files"].values())
        self._verify_provenance(provenance_of(output), artifact.sha256)
        self._verify_inputs(path, artifact)
        return artifact

    def _verify_inputs(self, path: Path, artifact: Artifact) -> None:
        """Compare what an artifact was made from with what is there, by hash; then what was asked for."""
        made_from = {source: self.verify(source) for source in artifact.manifest["inputs"]}
        readable = {source: found for source, found in made_from.items() if found is not None}
        for source, found in readable.items():
            expected = artifact.manifest["inputs"][source]
            if found.sha256 != expected:
                hashes = f"manifest {expected[:16]}, now {found.sha256[:16]}"
                self.mismatches.append(f"{path}: was made from another {source} ({hashes}); make it again")
        fingerprints = [found.manifest["fingerprint"] for found in readable.values()]
        expected = fingerprint_of(artifact.manifest["spec"], fingerprints)
        if len(readable) == len(made_from) and artifact.manifest["fingerprint"] != expected:
            values = f"expected {expected[:16]} of its spec and inputs, found {artifact.manifest['fingerprint'][:16]}"
            self.mismatches.append(f"{path}: carries another fingerprint: {values}; make it again")

    def _verify_provenance(self, path: Path, manifest: str) -> None:
        """Compare a record of provenance with its own hash and with its manifest's; records without both are older."""
        try:
            record, raw = _provenance(path)
        except DamagedError as error:
            self.mismatches.append(str(error))
            return
        if not {"sha256", "manifest"} & set(record) and set(record) >= EARLIER:
            return
        is_as_written = raw == store.text_of(record).encode()
        if record.pop("sha256", None) != digest(canonical(record)) or not is_as_written:
            self.mismatches.append(f"{path}: edited or damaged: its content does not match the sha256 it carries")
        elif record.get("manifest") != manifest:
            found = f"is the provenance of manifest {str(record.get('manifest'))[:16]}, expected {manifest[:16]}"
            self.mismatches.append(f"{path}: {found}: it was copied here, or the job was killed while it published")

    def find_strangers(self) -> None:
        """Add everything in ``results/`` that belongs to no artifact; nothing is hashed for it."""
        results = self.directory / "results"
        for path in self._strangers(results):
            self.mismatches.append(f"{path}: belongs to no artifact of the study: move it away")

    def _strangers(self, folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
        """Files below ``folder`` that no manifest claims; ``above``: folders on the way, where a link leads back."""
        here = os.path.realpath(folder)
        if os.path.lexists(folder / "manifest.json") and above:
            yield from self._strangers_in_artifact(folder / "manifest.json")
            return
        entries = sorted(folder.iterdir()) if here not in above and folder.is_dir() else []
        claimed = self._claimed(entries) | (set() if above else {folder / name for name in REPORTS})
        for path in entries:
            if path.is_dir() and not _is_hidden(path):
                yield from self._strangers(path, above | {here})
            elif path not in claimed and not _is_hidden(path):
                yield path

    def _strangers_in_artifact(self, manifest: Path) -> Iterator[Path]:
        """Files of an artifact's folder that its manifest does not list; the manifest where it is not its own."""
        try:
            listed = store.load_manifest(manifest)[0]["files"]
        except DamagedError:
            if manifest not in self.looked_at:  # else it is a mismatch already; its files are nobody else's
                yield manifest
            return
        yield from (manifest.parent / name for name in store.unlisted_files(manifest, listed))

    def _claimed(self, entries: list[Path]) -> set[Path]:
        """Manifests of scores and tables among these, with what they list and their provenance."""
        claimed: set[Path] = set()
        for path in entries:
            if path.suffix != ".json" or path.name == "manifest.json":
                continue
            try:
                listed = store.load_manifest(path)[0]["files"]
            except DamagedError:
                if path not in self.looked_at:  # else it is a mismatch already
                    continue
                listed = [path.with_suffix(suffix).name for suffix in (".csv", ".md")]
            claimed |= {path, provenance_of(path), costs_of(path), *(path.parent / name for name in listed)}
        return claimed


def _provenance(path: Path) -> tuple[dict[str, Any], bytes]:
    """A record of provenance and its bytes. Raises :class:`DamagedError` where there is none that can be read."""
    try:
        raw = read_regular(plain_file(path.parent, path.name), limit=JSON_LIMIT)
        record = json.loads(raw)
        canonical(record)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DamagedError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record, raw


def _is_hidden(path: Path) -> bool:
    """Whether this is a file system's own, or what a job that is running has not published yet."""
    return path.name.startswith(".") and any(part in path.name for part in NOT_OURS)
