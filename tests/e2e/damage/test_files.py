"""What hashes see: any damage to any file of any artifact is refused by its reader and by verify, with a remedy."""

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmfusion.artifacts import store
from llmfusion.cli.main import main
from llmfusion.errors import DamagedError
from llmfusion.study.addresses import output_of
from llmfusion.study.kinds import all_kinds
from tests.e2e.damage.finished import PIVOT, RESULTS, files_of, kind_name, manifest_path, manifests

KINDS = [
    name for name in all_kinds() if name != "capture_shard"
]  # shards' files are the cache's, which is what is read
SINGLE = {name for name in KINDS if not output_of(all_kinds()[name].address).endswith("manifest.json")}
Damage = Callable[[Path, random.Random], Path]  # returns the file that the message must name


def flip(path: Path, rng: random.Random) -> Path:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * path.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path


def zero_tail(path: Path, rng: random.Random) -> Path:
    """A hole at the end, as a crash leaves it behind."""
    size = path.stat().st_size
    os.truncate(path, size - rng.randint(1, min(size, 4096)) // 2 - 1)
    os.truncate(path, size)
    return path


def shorten(path: Path, rng: random.Random) -> Path:
    os.truncate(path, path.stat().st_size - 1)
    return path


def empty(path: Path, rng: random.Random) -> Path:
    os.truncate(path, 0)
    return path


def remove(path: Path, rng: random.Random) -> Path:
    path.unlink()
    return path


MORE = ("pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json", "modeling.py", "more.jsonl")


def add(path: Path, rng: random.Random) -> Path:
    """One file more than the manifest lists."""
    other = path.with_name(rng.choice(MORE))
    other.write_bytes(b"{}")
    return other


CHANGED = "damaged: expected sha256 {sha256}, found {found_sha256}"
RESIZED = "has {found_size} bytes, expected {size}"
EDITED = "is not JSON|.*edited or damaged.*expected .* found |is no manifest of this project"
AGAIN = "snakemake {manifest} -f"
# by damage: what is said of a file, of a manifest, and the remedy for both
DAMAGES: dict[Damage, tuple[str, str, str, str]] = {
    flip: (CHANGED, EDITED, AGAIN, AGAIN),
    zero_tail: (CHANGED, EDITED, AGAIN, AGAIN),
    shorten: (RESIZED, EDITED, AGAIN, AGAIN),
    empty: (RESIZED, EDITED, AGAIN, AGAIN),
    remove: ("is missing: expected a file of {size} bytes", "is not there", AGAIN, "snakemake {manifest}"),
    add: ("not in {manifest}", "not in {manifest}", "move it away", "move it away"),
}
PAIRS = [(kind, damage) for kind in KINDS for damage in DAMAGES if not (damage is add and kind in SINGLE)]


@contextmanager
def damaged(path: Path, damage: Damage, seed: object) -> Iterator[Path]:
    """Damage a file under its old times, and mend it afterwards; gives the file that a message must name."""
    content = path.read_bytes()
    dates = path.stat()
    at = damage(path, random.Random(f"{damage.__name__} {path} {seed}"))
    if path.exists():
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert at != path or not path.exists() or path.read_bytes() != content
    yield at
    at.unlink(missing_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))


def message_of(damage: Damage, at: Path, content: bytes, manifest: Path) -> str:
    """A pattern of the whole message: the file, what was expected and found, what to do."""
    found = at.read_bytes() if at.exists() else b""
    values = {
        "size": len(content),
        "found_size": len(found),
        "sha256": hashlib.sha256(content).hexdigest(),
        "found_sha256": hashlib.sha256(found).hexdigest(),
        "manifest": re.escape(str(manifest)),
    }
    of_file, of_manifest, remedy, remedy_of_manifest = (text.format(**values) for text in DAMAGES[damage])
    message, remedy = (of_manifest, remedy_of_manifest) if at == manifest else (of_file, remedy)
    return rf"{re.escape(str(at))}: ({message}).*{remedy}$"


def refuse_by_reader_and_verify(
    path: Path, manifest: Path, damage: Damage, seed: object, capsys: pytest.CaptureFixture[str]
) -> None:
    content = path.read_bytes()
    with damaged(path, damage, seed) as at:
        with pytest.raises(DamagedError) as caught:
            store.read(manifest)
        assert re.match(message_of(damage, at, content, manifest), str(caught.value)), caught.value
        target = RESULTS / ("table2.json" if at == RESULTS / "table2.csv" else "table2.csv")
        assert main(["verify", str(target)]) == 1
        assert f"mismatch: {caught.value}" in capsys.readouterr().err


def test_every_kind_was_made_and_no_file_goes_unhashed(study: Path) -> None:
    assert {kind_name(manifest) for manifest in manifests()} == set(all_kinds())
    hashed = {file for manifest in manifests() for file in files_of(manifest)}
    of_the_run = {RESULTS / "table2.cost.csv"}  # what jobs took is no artifact, as provenance is none
    files = {p for p in RESULTS.rglob("*") if p.is_file() and not p.name.endswith("provenance.json")}
    assert files == hashed | of_the_run
    assert main(["verify", "results/table2.csv"]) == 0


@pytest.mark.parametrize("scope", ["one", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "damage"), PAIRS, ids=[f"{kind}-{damage.__name__}" for kind, damage in PAIRS])
def test_damage_to_any_file_is_refused_by_its_reader_and_by_verify(
    study: Path, capsys: pytest.CaptureFixture[str], kind: str, damage: Damage, scope: str
) -> None:
    cases = [(file, manifest) for manifest in manifests(kind) for file in files_of(manifest)]
    rng = random.Random(f"{kind} {damage.__name__}")
    for file, manifest in cases if scope == "all" else rng.sample(cases, min(2, len(cases))):
        refuse_by_reader_and_verify(file, manifest, damage, scope, capsys)
    assert main(["verify", "results/table2.csv"]) == 0  # every mend was one


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_single_bit_of_a_manifest_counts(study: Path, kind: str) -> None:
    manifest = manifests(kind)[0]
    content = manifest.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(changed)
        with pytest.raises(DamagedError):
            store.read(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flipped_after_its_hash_was_remembered_is_seen(
    study: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(store, "REMEMBER_BYTES", 1)
    files = 0
    for manifest in manifests(kind):
        store.read(manifest)
        for file in files_of(manifest)[:-1]:
            files += 1
            expected = f"^{file}: damaged: expected sha256"
            with damaged(file, flip, "remembered"), pytest.raises(DamagedError, match=expected):
                store.read(manifest)
    assert len(list(Path("work/verified").glob("*.json"))) == files


NOTES: dict[str, Callable[[bytes], bytes]] = {
    "a list": lambda note: b"[]",
    "text": lambda note: b'"x"',
    "nothing": lambda note: b"",
    "another hash": lambda note: note.replace(b'"sha256":"', b'"sha256":"0'),
}


@pytest.mark.parametrize("spoil", NOTES.values(), ids=NOTES)
def test_a_sound_file_is_not_refused_for_a_damaged_memory(
    study: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(store, "REMEMBER_BYTES", 1)
    store.read(manifest_path(PIVOT))
    for note in Path("work/verified").iterdir():
        note.write_bytes(spoil(note.read_bytes()))
    store.read(manifest_path(PIVOT))


def test_a_linked_folder_is_one_file_too_many(study: Path) -> None:
    manifest = manifest_path(PIVOT)
    (manifest.parent / "additional_chat_templates").symlink_to(study / "logs")
    with pytest.raises(DamagedError, match=r"additional_chat_templates: not in .*move it away"):
        store.read(manifest)
