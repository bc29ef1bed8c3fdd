"""Folders that can be trusted: written at once or not at all, verified by whoever reads them.

An artifact is a folder with a ``manifest.json``: its address, what was asked (spec, fingerprint), from what (its
inputs' manifests by hash), and every file's size and sha256. The manifest is deterministic; time, host and versions
stand in ``provenance.json`` beside it, which names the manifest by its hash. A score or a table is the same manifest
in a single file, or beside its files.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io.digests import canonical, digest, fingerprint_of
from llmfusion.io.files import (
    JSON_LIMIT,
    default_rights,
    json_object_or_empty,
    plain_file,
    plain_files,
    read_regular,
    sha256_file,
    sync,
    write_file,
)
from llmfusion.study.addresses import address_of, manifest_of, output_of, provenance_of, results_index

REMEMBER_BYTES = 64 * 2**20  # larger files are hashed once a change, smaller ones at every reading
UNLISTED = {"manifest.json", "provenance.json"}
FIELDS: dict[str, type] = {
    "address": str,
    "spec": str,
    "fingerprint": str,
    "inputs": dict,
    "files": dict,
    "facts": dict,
}
# of the group and of others: the bit with which they read, and all their bits
READERS = ((stat.S_IRGRP, stat.S_IRWXG), (stat.S_IROTH, stat.S_IRWXO))


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
    def place(self) -> Path:
        """What its readers must be able to read beside its files: its folder, or the manifest of a score or a table."""
        manifest = manifest_of(Path(output_of(self.manifest["address"])))
        return self.folder if manifest.name == "manifest.json" else self.folder / manifest.name

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
    beside = (manifest_of(output), provenance_of(output))  # of a score or a table
    written = "|".join(re.escape(path.name) for path in beside)
    # dots count: drafts of qwen2.5 are not those of qwen2
    own = re.compile(rf"\.({re.escape(place.name)}\.[^.]+\.draft(\.old)?|({written})\.\d+\.tmp)")
    return [path for path in place.parent.glob(".*") if own.fullmatch(path.name)]


def remove_drafts(output: Path) -> None:
    """Remove what killed writers of this artifact left behind; only for the holder of its lease."""
    remove(drafts_of(output))


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, as far as that is possible."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read(manifest: str | Path, memory: Path | None = Path("work/verified"), fingerprint: str | None = None) -> Artifact:
    """Read an artifact by its manifest and verify every file against it.

    Raises :class:`DamagedError` naming the file, what was expected and what was found, and what to do: also where the
    manifest is of another address than its path's, or of another ``fingerprint`` than the one expected (None: any).
    ``memory`` is a folder that remembers hashes of files over 64 MiB by path, size, times and inode (the change time
    cannot be set back, so a file changed under an old modification time is still hashed again); None hashes everything.
    """
    path = Path(manifest)
    content, sha256 = load_manifest(path)
    if fingerprint is not None and content["fingerprint"] != fingerprint:
        found = f"fingerprint {content['fingerprint'][:16]}, this study asks for {fingerprint[:16]}"
        raise DamagedError(f"{path}: was made by another study or with other settings ({found}); {_remedy(path)}")
    for name, expected in content["files"].items():
        _verify(path.parent, name, expected, path, memory)
    if unlisted := unlisted_files(path, content["files"]):
        reason = "a file nobody hashed could change how the rest is read; move it away"
        raise DamagedError(f"{path.parent / unlisted[0]}: not in {path}: {reason}")
    return Artifact(path.parent, content, sha256)


def unlisted_files(manifest: Path, listed: dict[str, Any]) -> list[str]:
    """Files in an artifact's own folder that its manifest does not list; hidden ones (of file systems) do not count."""
    if manifest.name != "manifest.json":
        return []
    folder = manifest.parent
    names = (
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if (p.is_symlink() or not p.is_dir()) and not p.name.startswith(".")
    )
    return sorted(name for name in names if name not in listed and name not in UNLISTED)


def load_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """A manifest as it was written, and the sha256 of its bytes; the files it lists are not looked at.

    Raises :class:`DamagedError` as :func:`read` does.
    """
    try:
        path.lstat()
        plain_file(path.parent, path.name)
        raw = read_regular(path, limit=JSON_LIMIT)
        content = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path}: is not there; make it with: snakemake {_target(path)}") from None
    except DamagedError as error:
        raise DamagedError(f"{error}; {_remedy(path)}") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not JSON ({error}); {_remedy(path)}") from None
    _require_manifest(path, content)
    if raw != (written := text_of(content).encode()):
        reason = f"expected {len(written)} bytes as they were written, found {len(raw)} others"
        raise DamagedError(f"{path}: edited or damaged: {reason}; {_remedy(path)}")
    _require_address(path, content["address"])
    return content, hashlib.sha256(raw).hexdigest()


def _require_manifest(path: Path, content: Any) -> None:
    """Raise :class:`DamagedError` where ``content`` is no manifest, or not the one its own sha256 was taken of."""
    if not isinstance(content, dict) or not set(FIELDS) <= set(content):
        raise DamagedError(f"{path}: is no manifest of this project; {_remedy(path)}")
    actual = _own_sha256(content)
    if content.get("sha256") != actual:
        reason = f"edited or damaged (expected {content.get('sha256')}, found {actual})"
        raise DamagedError(f"{path}: its content does not match the sha256 it carries: {reason}; {_remedy(path)}")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content[name], kind)] or _malformed(content)
    if wrong:
        raise DamagedError(f"{path}: is no manifest of this project ({', '.join(wrong)}); {_remedy(path)}")


def _malformed(content: dict[str, Any]) -> list[str]:
    """Which fields of a manifest hold what no manifest is written with."""
    sound = {
        "spec": _is_object(content["spec"]),
        "inputs": all(isinstance(sha256, str) for sha256 in content["inputs"].values()),
        "files": all(_is_file_entry(entry) for entry in content["files"].values()),
    }
    return [name for name, is_sound in sound.items() if not is_sound]


def _is_file_entry(entry: Any) -> bool:
    """Whether this is what a manifest holds of a file."""
    return isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)


def _is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _require_address(path: Path, address: str) -> None:
    """Raise :class:`DamagedError` for the manifest of another artifact than the one whose place this is."""
    try:
        expected = address_of(path)
    except UserError:  # in no results/ folder
        return
    if address != expected:
        raise DamagedError(
            f"{path}: is the manifest of {address}, expected that of {expected}: it was moved or copied here; "
            f"put it back, or {_remedy(path)}"
        )


def _own_sha256(content: dict[str, Any]) -> str:
    """The sha256 that a manifest of this content carries."""
    try:
        return digest(canonical({key: value for key, value in content.items() if key != "sha256"}))
    except (ValueError, RecursionError):  # a NaN, which no manifest is written with
        return "none: it holds a number that is not finite, or is nested too deeply"


def text_of(content: dict[str, Any]) -> str:
    """A manifest or a provenance record as it is written."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _verify(folder: Path, name: str, expected: dict[str, Any], manifest: Path, memory: Path | None) -> None:
    path = folder / name
    try:
        path.lstat()
        size = plain_file(folder, name).stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{path}: has {size} bytes, expected {expected['size']}")
        if _remembered_sha256(path, memory) == expected["sha256"]:
            return
        # what was remembered may itself be damaged: a valid file is not refused for it
        actual = sha256_file(path, follow_links=False)
    except (FileNotFoundError, NotADirectoryError):
        missing = f"is missing: expected a file of {expected['size']} bytes"
        raise DamagedError(f"{path}: {missing}; {_remedy(manifest)}") from None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    except DamagedError as error:
        raise DamagedError(f"{error}; {_remedy(manifest)}") from None
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
    found = path.stat()
    if memory is None or found.st_size < REMEMBER_BYTES:
        return sha256_file(path, follow_links=False)
    state = [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
    note = memory / f"{digest(str(state[0]))}.json"
    remembered = json_object_or_empty(note)
    if remembered.get("state") == state:
        return str(remembered.get("sha256"))
    actual = sha256_file(path, follow_links=False)
    with contextlib.suppress(OSError):  # a memory that cannot be written costs time only
        memory.mkdir(parents=True, exist_ok=True)
        write_file(note, canonical({"state": state, "sha256": actual}).encode())
    return actual


def identity(output: Path) -> list[int] | None:
    """What tells whether an artifact is still the one that was there before; None where there is none."""
    try:
        found = manifest_of(output).lstat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_mtime_ns]


def readers(path: Path) -> int:
    """Permission bits of those who may read a file or folder: nobody else may read what is made from it."""
    mode = path.stat().st_mode
    return stat.S_IRWXU | sum(everything for may_read, everything in READERS if mode & may_read)


@dataclass
class Draft:
    """An artifact in the making. Steps write files into ``folder`` and metadata into ``facts``."""

    address: str
    spec_text: str
    inputs: dict[str, Artifact]
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    rights: int = field(default_factory=default_rights)  # permission bits of its folder

    def __post_init__(self) -> None:
        for artifact in self.inputs.values():
            for path in (artifact.place, *map(artifact.file, artifact.manifest["files"])):
                self.restrict_to_readers_of(path)

    def restrict_to_readers_of(self, source: Path) -> None:
        """Publish to nobody who may not read ``source`` (a file or a folder), of which this artifact is made."""
        self.rights &= readers(source)

    @property
    def fingerprint(self) -> str:
        """Hash of the spec and of the inputs' fingerprints: what was asked for."""
        return fingerprint_of(self.spec_text, (a.manifest["fingerprint"] for a in self.inputs.values()))

    @property
    def key(self) -> str:
        """What resume state belongs to: this spec over the very content of these inputs."""
        return digest(self.spec_text, *sorted(a.sha256 for a in self.inputs.values()))

    def manifest(self) -> dict[str, Any]:
        """The manifest of what lies in ``folder`` now: plain files only, anything else raises :class:`DamagedError`."""
        names = plain_files(self.folder)
        body = {
            "address": self.address,
            "spec": self.spec_text,
            "fingerprint": self.fingerprint,
            "inputs": {address: artifact.sha256 for address, artifact in sorted(self.inputs.items())},
            "files": {name: _size_and_sha256(self.folder / name) for name in names},
            "facts": self.facts,
        }
        return {**body, "sha256": digest(canonical(body))}

    def made_already(self, output: Path, before: list[int] | None) -> bool:
        """Whether ``output`` is a valid artifact of the same spec and inputs that was finished while this job waited.

        ``before`` is its :func:`identity` when the job began, or the killed one that it goes on from: what was there
        then is to be made again.
        """
        if identity(output) == before:
            return False
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
    _set_rights(draft.folder, draft.rights)
    infinite = [name for name, value in draft.facts.items() if not _finite(value)]
    require(not infinite, f"{draft.address}: {', '.join(infinite)}: a number that is not finite; nothing was published")
    manifest = text_of(draft.manifest()).encode()
    body = {**provenance, "manifest": hashlib.sha256(manifest).hexdigest()}
    record = text_of({**body, "sha256": digest(canonical(body))}).encode()
    if output.name == "manifest.json":
        _publish_folder(draft, output.parent, manifest, record)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in sorted(draft.folder.iterdir()):
        os.replace(path, output.parent / path.name)
    write_file(provenance_of(output), record, draft.rights & 0o666)
    write_file(manifest_of(output), manifest, draft.rights & 0o666)


def _set_rights(folder: Path, rights: int) -> None:
    """Give files and folders below ``folder`` these rights, and have them on the disk. Files may not be executed."""
    plain_files(folder)  # a link would lead out
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o777 | rights)  # a folder's group may be handed down
        elif path.is_file():
            if path.stat().st_nlink == 1:  # a linked file is also somebody else's
                path.chmod(rights & 0o666)
            sync(path)


def _finite(value: Any) -> bool:
    """Whether a fact can be written: JSON has no NaN and no infinity."""
    try:
        return bool(canonical(value))
    except ValueError:
        return False


def _publish_folder(draft: Draft, target: Path, manifest: bytes, record: bytes) -> None:
    folder = draft.folder
    write_file(folder / "provenance.json", record, draft.rights & 0o666)
    write_file(folder / "manifest.json", manifest, draft.rights & 0o666)
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~0o777 | draft.rights)
    aside = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(folder, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
