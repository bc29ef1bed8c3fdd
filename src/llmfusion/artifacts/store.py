"""Folders that can be trusted: written at once or not at all, verified by whoever reads them.

An artifact is a folder with a ``manifest.json``: what was asked (spec, fingerprint), from what (its inputs' manifests
by hash), and every file's size and sha256. The manifest is deterministic; time, host and versions stand in
``provenance.json`` beside it. A score or a table is the same manifest in a single file, or beside its files.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import sha256_file, sync, write_file
from llmfusion.study.addresses import manifest_of, results_index

REMEMBER_BYTES = 64 * 2**20  # larger files are hashed once a change, smaller ones at every reading
UNLISTED = {"manifest.json", "provenance.json"}


class _Facts(dict[str, Any]):
    """Facts that name their manifest where one is missing."""

    def __init__(self, facts: dict[str, Any], owner: str):
        super().__init__(facts)
        self._owner = owner

    def __missing__(self, key: str) -> Any:
        raise DamagedError(f"{self._owner} says nothing of {key!r}; it holds: {', '.join(self)}")


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder, its manifest, and the manifest's own hash."""

    folder: Path
    manifest: dict[str, Any]
    sha256: str

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked for, as plain data."""
        return cast(dict[str, Any], json.loads(self.manifest["spec"]))

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata recorded by the step; an absent key raises :class:`DamagedError`."""
        address = self.manifest.get("address", "an artifact")
        return _Facts(self.manifest["facts"], f"{self.folder}: the manifest of {address}")

    def file(self, name: str) -> Path:
        """Path of one of its files; raises :class:`DamagedError` if the manifest has no such file."""
        if name not in self.manifest["files"]:
            listed = ", ".join(self.manifest["files"])
            raise DamagedError(f"{self.folder}: the manifest lists no file {name!r}; it lists: {listed}")
        return self.folder / name


def draft_folder(output: Path, token: str) -> Path:
    """Where an artifact is made: beside its place, so that one rename publishes it also if folders are mounted apart.

    ``token`` is the lease's: a writer that has lost its lease cannot touch the draft of the one that took over.
    """
    place = output.parent if output.name == "manifest.json" else output
    return place.with_name(f".{place.name}.{token[:12]}.draft")


def drafts_of(output: Path) -> list[Path]:
    """What writers of this artifact have not yet published, or left behind when they were killed."""
    place = output.parent if output.name == "manifest.json" else output
    beside = (manifest_of(output), output.with_suffix(".provenance.json"))  # of a score or a table
    written = "|".join(re.escape(path.name) for path in beside)
    # dots count: drafts of qwen2.5 are not those of qwen2
    own = re.compile(rf"\.({re.escape(place.name)}\.[^.]+\.draft(\.old)?|({written})\.\d+\.tmp)")
    return [path for path in place.parent.glob(".*") if own.fullmatch(path.name)]


def remove_drafts(output: Path) -> None:
    """Remove what killed writers of this artifact left behind; only for the holder of its lease."""
    for path in drafts_of(output):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read(manifest: str | Path, memory: Path | None = Path("work/verified")) -> Artifact:
    """Read an artifact by its manifest and verify every file against it.

    Raises :class:`DamagedError` naming the file, what was expected and what was found, and what to do. ``memory`` is
    a folder that remembers hashes of files over 64 MiB by path, size, times and inode (the change time cannot be set
    back, so a file changed under an old modification time is still hashed again); None hashes everything.
    """
    path = Path(manifest)
    content = _load(path)
    for name, expected in content["files"].items():
        _verify(path.parent / name, expected, path, memory)
    if path.name == "manifest.json":
        _refuse_unlisted(path, content["files"])
    return Artifact(path.parent, content, sha256_file(path))


def _refuse_unlisted(manifest: Path, listed: dict[str, Any]) -> None:
    folder = manifest.parent
    names = (
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if (p.is_symlink() or not p.is_dir()) and not p.name.startswith(".")
    )
    unlisted = sorted(name for name in names if name not in listed and name not in UNLISTED)
    if unlisted:
        reason = "a file nobody hashed could change how the rest is read; move it away"
        raise DamagedError(f"{folder / unlisted[0]}: not in {manifest}: {reason}")


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except FileNotFoundError:
        raise DamagedError(f"{path}: is not there; make it with: snakemake {_target(path)}") from None
    except ValueError as error:
        raise DamagedError(f"{path}: is not JSON ({error}); {_remedy(path)}") from None
    if not isinstance(content, dict) or not {"spec", "fingerprint", "inputs", "files", "facts"} <= set(content):
        raise DamagedError(f"{path}: is no manifest of this project; {_remedy(path)}")
    actual = _own_sha256(content)
    if content.get("sha256") != actual:
        reason = f"edited or damaged (expected {content.get('sha256')}, found {actual})"
        raise DamagedError(f"{path}: its content does not match the sha256 it carries: {reason}; {_remedy(path)}")
    if raw != (written := _text(content).encode()):
        reason = f"expected {len(written)} bytes as they were written, found {len(raw)} others"
        raise DamagedError(f"{path}: edited or damaged: {reason}; {_remedy(path)}")
    return content


def _own_sha256(content: dict[str, Any]) -> str:
    """The sha256 that a manifest of this content carries."""
    try:
        return digest(canonical({key: value for key, value in content.items() if key != "sha256"}))
    except ValueError:  # a NaN, which no manifest is written with
        return "none: it holds a number that is not finite"


def _text(content: dict[str, Any]) -> str:
    """A manifest or a provenance record as it is written."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _verify(path: Path, expected: dict[str, Any], manifest: Path, memory: Path | None) -> None:
    if not path.is_file():
        raise DamagedError(f"{path}: is missing: expected a file of {expected['size']} bytes; {_remedy(manifest)}")
    size = path.stat().st_size
    if size != expected["size"]:
        raise DamagedError(f"{path}: has {size} bytes, expected {expected['size']}; {_remedy(manifest)}")
    if _remembered_sha256(path, memory) == expected["sha256"]:
        return
    actual = sha256_file(path)  # what was remembered may itself be damaged: a valid file is not refused for it
    if actual != expected["sha256"]:
        reason = f"expected sha256 {expected['sha256']}, found {actual}"
        raise DamagedError(f"{path}: damaged: {reason}; {_remedy(manifest)}")


def _remedy(manifest: Path) -> str:
    return f"make it again with: snakemake {_target(manifest)} -f"


def _target(manifest: Path) -> Path:
    """A manifest as Snakemake knows it: from ``results/`` on, wherever the study lies."""
    try:
        return Path(*manifest.parts[results_index(manifest) :])
    except UserError:
        return manifest


def _remembered_sha256(path: Path, memory: Path | None) -> str:
    """sha256 of a file, from ``memory`` if the file is large and unchanged since it was hashed."""
    stat = path.stat()
    if memory is None or stat.st_size < REMEMBER_BYTES:
        return sha256_file(path)
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    note = memory / f"{digest(str(state[0]))}.json"
    try:
        remembered = json.loads(note.read_bytes())
        if remembered["state"] == state:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    actual = sha256_file(path)
    memory.mkdir(parents=True, exist_ok=True)
    write_file(note, canonical({"state": state, "sha256": actual}).encode())
    return actual


@dataclass
class Draft:
    """An artifact in the making. Steps write files into ``folder`` and metadata into ``facts``."""

    address: str
    spec_text: str
    inputs: dict[str, Artifact]
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the spec and of the inputs' fingerprints: what was asked for."""
        return digest(self.spec_text, *sorted(a.manifest["fingerprint"] for a in self.inputs.values()))

    @property
    def key(self) -> str:
        """What resume state belongs to: this spec over the very content of these inputs."""
        return digest(self.spec_text, *sorted(a.sha256 for a in self.inputs.values()))

    def manifest(self) -> dict[str, Any]:
        """The manifest of what lies in ``folder`` now."""
        names = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        body = {
            "address": self.address,
            "spec": self.spec_text,
            "fingerprint": self.fingerprint,
            "inputs": {address: artifact.sha256 for address, artifact in sorted(self.inputs.items())},
            "files": {name: _size_and_sha256(self.folder / name) for name in names},
            "facts": self.facts,
        }
        return {**body, "sha256": digest(canonical(body))}

    def made_already(self, output: Path) -> bool:
        """Whether ``output`` is a valid artifact of the same spec and inputs: finished while this job waited."""
        try:
            manifest = read(manifest_of(output)).manifest
        except DamagedError:
            return False
        inputs = {address: artifact.sha256 for address, artifact in self.inputs.items()}
        return bool(manifest["spec"] == self.spec_text and manifest["inputs"] == inputs)


def _size_and_sha256(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def publish(draft: Draft, output: Path, provenance: dict[str, Any]) -> None:
    """Put a finished draft in place: a folder by one rename, a score or a table by one rename a file, manifest last."""
    for path in draft.folder.rglob("*"):
        if path.is_file():
            if path.stat().st_nlink == 1:  # a linked file is also somebody else's
                path.chmod(0o644)
            sync(path)
    infinite = [name for name, value in draft.facts.items() if not _finite(value)]
    require(not infinite, f"{draft.address}: {', '.join(infinite)}: a number that is not finite; nothing was published")
    manifest = _text(draft.manifest()).encode()
    record = _text(provenance).encode()
    if output.name == "manifest.json":
        _publish_folder(draft.folder, output.parent, manifest, record)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(draft.folder.iterdir()):
        os.replace(path, output.parent / path.name)
    write_file(output.with_suffix(".provenance.json"), record)
    write_file(manifest_of(output), manifest)


def _finite(value: Any) -> bool:
    """Whether a fact can be written: JSON has no NaN and no infinity."""
    try:
        return bool(canonical(value))
    except ValueError:
        return False


def _publish_folder(draft: Path, target: Path, manifest: bytes, record: bytes) -> None:
    write_file(draft / "provenance.json", record)
    write_file(draft / "manifest.json", manifest)
    draft.chmod(0o755)
    aside = draft.with_name(f"{draft.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(draft, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
