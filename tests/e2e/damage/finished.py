"""The finished tiny study: its artifacts, the commands that made them, and honest manifests over changed files."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmfusion.artifacts import store
from llmfusion.io.digests import canonical
from llmfusion.study.addresses import address_of, manifest_of, output_of
from llmfusion.study.kinds import all_kinds
from tests.e2e.damage.spoil import Spoil
from tests.project import command_in

RESULTS = Path("results")
PIVOT, CODE, SFT, KD = (f"models/{name}" for name in ("base/pivot", "base/code", "trained/sft", "trained/kd-code"))
MERGED = "models/merged/ta-homogeneous"
CACHE, MIX, GENERATED = "teachers/base/code/student", "data/mix/student", "data/generated/base/code/student"
SHARD = "teachers/shards/base/code/student/1-of-2"  # reads model and mix; the cache is assembled from it
ACCEPTED = "accepted"  # in place of a message, where a step made its artifact all the same
Copy = dict[str, Path]  # files of the finished study by their names below its folder
Make = Callable[..., str]  # runs a step, see the fixture `message_of_step`


def put_back(originals: Copy, place: Path, since: float) -> None:
    """Make a copy, or undo what was done to it since a time."""
    for folder, folders, names in os.walk(place, topdown=False):
        for path in (f"{folder}/{name}" for name in names + folders):
            if os.path.isdir(path) and not os.path.islink(path):
                with suppress(OSError):
                    os.rmdir(path)  # if nothing is in it
            elif os.path.relpath(path, place) not in originals:
                os.unlink(path)
    for name, original in originals.items():
        target = place / name
        if not target.exists() or (target.stat().st_ctime > since and target.read_bytes() != original.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, target)


def kind_name(manifest: Path) -> str:
    """The rule that made the artifact of a manifest."""
    address = address_of(manifest)
    return next(name for name, kind in all_kinds().items() if kind.pattern.fullmatch(address))


def manifests(kind: str | None = None) -> list[Path]:
    """The manifest of every artifact in the working directory, or of those of one kind."""
    paths = (
        p for p in RESULTS.rglob("*.json") if p.name == "manifest.json" or p.parts[1] == "scores" or p.parent == RESULTS
    )
    return sorted(p for p in paths if not p.name.endswith("provenance.json") and kind in (None, kind_name(p)))


def files_of(manifest: Path) -> list[Path]:
    """Everything a reader of an artifact relies on: its files and the manifest itself."""
    return [*(manifest.parent / name for name in json.loads(manifest.read_text())["files"]), manifest]


def manifest_path(address: str) -> Path:
    """The manifest of an address, in the working directory."""
    return manifest_of(Path(output_of(address)))


def remake(address: str, change: Spoil = lambda folder: None, **facts: Any) -> None:
    """Change an artifact and write an honest manifest over it, as a faulty program would have done."""
    manifest = manifest_path(address)
    body = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "sha256"}
    if manifest.name == "manifest.json":
        change(manifest.parent)
        files = [p for p in sorted(manifest.parent.iterdir()) if p.name not in store.UNLISTED]
        body["files"] = {
            p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files
        }
    body["facts"] = {k: v for k, v in (body["facts"] | facts).items() if v is not ...}
    own = hashlib.sha256(canonical(body).encode()).hexdigest()
    manifest.write_text(json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n")
    store.read(manifest)


def command_of(address: str) -> list[str]:
    """The command that made an artifact, from its log: python, -m, llmfusion, step, ...; it prints what it says."""
    *words, _, spec = shlex.split(command_in(Path(f"logs/{address}.log")))  # ends with <<< SPEC
    words[words.index("--spec") + 1] = spec
    at = words.index("--log")
    return words[:at] + words[at + 2 :]


def remove_artifact(address: str) -> None:
    """Remove a finished artifact, so that a step has it to make."""
    output = Path(output_of(address))
    if output.name == "manifest.json":
        shutil.rmtree(output.parent)
        return
    for suffix in (output.suffix, ".json", ".md", ".provenance.json"):
        output.with_suffix(suffix).unlink(missing_ok=True)


def assert_nothing_is_left_of(address: str) -> None:
    """Neither output nor manifest, nor a draft, a temporary file or a lease."""
    assert not Path(output_of(address)).exists()
    assert not manifest_path(address).exists()
    assert [p for p in RESULTS.rglob(".*") if "draft" in p.name or "tmp" in p.name] == []
    assert not (Path("work") / address / "lease").exists()
