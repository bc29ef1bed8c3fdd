"""Publishing and reading artifacts: every sort of damage is refused by the name of the file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfusion.artifacts import store as artifacts
from llmfusion.artifacts.store import Artifact, Draft, draft_folder, publish, read
from llmfusion.errors import DamagedError, UserError
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import write_file
from llmfusion.study.addresses import address_of, manifest_of, results_index

CONTENT = {"a.bin": bytes(range(256)) * 4, "b.txt": b"text\n", "sub/c.bin": b"\0" * 10}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def draft(
    output: Path,
    address: str = "models/base/p",
    spec: str = '{"x":1}',
    inputs: dict[str, Artifact] | None = None,
    **content: bytes,
) -> Draft:
    folder = draft_folder(output, "token")
    for name, data in (content or CONTENT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Draft(address, spec, inputs or {}, folder, {"samples": 3})


def make(output: str = "results/models/base/p/manifest.json", **given: object) -> Path:
    publish(draft(Path(output), **given), Path(output), {"host": "here"})  # type: ignore[arg-type]
    return Path(output)


def rewrite(path: Path, data: bytes) -> None:
    """Change a file and set its old times again, as Snakemake would not notice."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_was_published_is_read_with_hashes_that_sha256_gives() -> None:
    manifest = make()
    found = read(manifest)
    assert found.spec == {"x": 1}
    assert found.facts == {"samples": 3}
    assert found.sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert found.manifest["files"] == {
        n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in CONTENT.items()
    }
    assert found.file("a.bin").read_bytes() == CONTENT["a.bin"]
    record = json.loads((manifest.parent / "provenance.json").read_text())
    assert record.pop("sha256") == digest(canonical(record))
    assert record == {"host": "here", "manifest": found.sha256}
    assert not draft_folder(manifest, "token").exists()


def test_the_manifest_depends_on_content_alone() -> None:
    one = make("one/results/models/base/p/manifest.json").read_bytes()
    output = Path("two/results/models/base/p/manifest.json")
    second = draft(output, **dict(reversed(CONTENT.items())))
    publish(second, output, {"host": "elsewhere", "seconds": 5})
    assert output.read_bytes() == one


def test_publishing_again_replaces_the_whole_folder() -> None:
    make()
    manifest = make(**{"only.txt": b"new"})
    assert sorted(p.name for p in manifest.parent.iterdir()) == ["manifest.json", "only.txt", "provenance.json"]
    assert list(read(manifest).manifest["files"]) == ["only.txt"]


def _truncate(folder: Path) -> None:
    rewrite(folder / "a.bin", CONTENT["a.bin"][:-1])


def _flip(folder: Path) -> None:
    data = bytearray(CONTENT["a.bin"])
    data[100] ^= 1
    rewrite(folder / "a.bin", bytes(data))


def _zero_tail(folder: Path) -> None:
    rewrite(folder / "a.bin", CONTENT["a.bin"][:-64] + b"\0" * 64)


def _grow(folder: Path) -> None:
    rewrite(folder / "a.bin", CONTENT["a.bin"] + b"\0")


DAMAGE = {
    "flipped bit": (_flip, "a.bin", "expected sha256"),
    "zeroed tail": (_zero_tail, "a.bin", "expected sha256"),
    "truncated": (_truncate, "a.bin", "has 1023 bytes, expected 1024"),
    "longer": (_grow, "a.bin", "has 1025 bytes, expected 1024"),
    "missing": (lambda f: (f / "b.txt").unlink(), "b.txt", "is missing"),
    "in a subfolder": (lambda f: rewrite(f / "sub/c.bin", b"\0" * 9 + b"\1"), "sub/c.bin", "damaged"),
    "extra file": (lambda f: (f / "extra.bin").write_bytes(b""), "extra.bin", "not in"),
    "extra file below": (lambda f: (f / "sub/extra.bin").write_bytes(b""), "sub/extra.bin", "not in"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "is not there"),
    "half a manifest": (
        lambda f: rewrite(f / "manifest.json", (f / "manifest.json").read_bytes()[:40]),
        "manifest.json",
        "is not JSON",
    ),
    "empty manifest": (lambda f: rewrite(f / "manifest.json", b""), "manifest.json", "is not JSON"),
    "bytes for a manifest": (lambda f: rewrite(f / "manifest.json", b"\xff\xfe"), "manifest.json", "is not JSON"),
    "another JSON": (lambda f: rewrite(f / "manifest.json", b"[]"), "manifest.json", "no manifest of this project"),
}


@pytest.mark.parametrize(("damage", "name", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_by_the_name_of_the_file_and_with_a_remedy(damage: object, name: str, said: str) -> None:
    manifest = make()
    read(manifest)
    damage(manifest.parent)  # type: ignore[operator]
    with pytest.raises(DamagedError) as caught:
        read(manifest)
    assert str(manifest.parent / name) in str(caught.value)
    assert said in str(caught.value)
    assert f"snakemake {manifest}" in str(caught.value) or "move it away" in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["facts"].update(samples=4),
        lambda m: m.update(spec='{"x":2}'),
        lambda m: m["files"]["a.bin"].update(size=1),
        lambda m: m["inputs"].update(x="0"),
        lambda m: m.pop("sha256"),
        lambda m: m.update(note="hello"),
    ],
)
def test_an_edited_manifest_is_refused(edit: object) -> None:
    manifest = make()
    content = json.loads(manifest.read_text())
    edit(content)  # type: ignore[operator]
    rewrite(manifest, json.dumps(content).encode())
    with pytest.raises(DamagedError, match="edited or damaged"):
        read(manifest)


def test_hidden_files_of_the_file_system_are_no_damage() -> None:
    manifest = make()
    (manifest.parent / ".nfs0001").write_bytes(b"x")
    read(manifest)


def test_a_large_file_is_hashed_once_and_again_after_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "REMEMBER_BYTES", 512)
    manifest = make()
    hashed: list[str] = []
    real = artifacts.sha256_file
    monkeypatch.setattr(artifacts, "sha256_file", lambda path, **given: hashed.append(path.name) or real(path, **given))
    read(manifest)
    read(manifest)
    assert hashed.count("a.bin") == 1
    assert hashed.count("b.txt") == 2
    _flip(manifest.parent)
    with pytest.raises(DamagedError, match="damaged"):
        read(manifest)


@pytest.mark.parametrize("note", [b"", b"{}", b"\0" * 20])
def test_a_damaged_memory_is_not_believed(monkeypatch: pytest.MonkeyPatch, note: bytes) -> None:
    monkeypatch.setattr(artifacts, "REMEMBER_BYTES", 512)
    manifest = make()
    read(manifest)
    for path in Path("work/verified").iterdir():
        path.write_bytes(note)
    read(manifest)


@pytest.mark.parametrize(
    "make_it", [lambda p: p.symlink_to("/etc/hostname"), os.mkfifo, lambda p: p.symlink_to("/etc")]
)
def test_what_is_no_plain_file_is_not_published_and_what_a_link_leads_to_keeps_its_rights(
    make_it: Callable[[Path], object], tmp_path: Path
) -> None:
    output = Path("results/models/base/p/manifest.json")
    made = draft(output)
    make_it(made.folder / "more")
    before = [Path(name).stat().st_mode for name in ("/etc", "/etc/hostname")]
    with pytest.raises(DamagedError, match=r"more: is a (symbolic link|FIFO)"):
        publish(made, output, {})
    assert not output.parent.exists()
    assert [Path(name).stat().st_mode for name in ("/etc", "/etc/hostname")] == before


def test_a_file_the_manifest_does_not_list_cannot_be_asked_for() -> None:
    with pytest.raises(DamagedError, match=r"lists no file 'nothing'; it lists: a\.bin, b\.txt"):
        read(make()).file("nothing")


def test_a_single_file_is_its_own_manifest() -> None:
    output = Path("results/scores/base/p/gsm8k.json")
    one = Draft("scores/base/p/gsm8k", "{}", {}, draft_folder(output, "token"), {"k": 1})
    one.folder.mkdir(parents=True)
    publish(one, output, {})
    assert read(output).facts == {"k": 1}
    (output.parent / "math.json").write_text("another cell lies beside it")
    assert read(output).facts == {"k": 1}


def test_a_table_is_verified_with_the_manifest_beside_it() -> None:
    output = Path("results/t.csv")
    publish(draft(output, "tables/t", **{"t.csv": b"a,b\n", "t.md": b"|"}), output, {})
    assert read(manifest_of(output)).manifest["address"] == "tables/t"
    rewrite(output, b"a,c\n")
    with pytest.raises(DamagedError, match=r"t\.csv: damaged"):
        read(manifest_of(output))


def test_made_already_means_the_same_spec_and_the_same_inputs() -> None:
    output = Path("results/models/base/p/manifest.json")
    source = read(make("results/data/mix/m/manifest.json", address="data/mix/m"))
    inputs = {"data/mix/m": source}
    assert not draft(output, inputs=inputs).made_already(output, None)
    publish(draft(output, inputs=inputs), output, {})
    assert Draft("models/base/p", '{"x":1}', inputs, Path("d")).made_already(output, None)
    assert not Draft("models/base/p", '{"x":2}', inputs, Path("d")).made_already(output, None)
    assert not Draft("models/base/p", '{"x":1}', {}, Path("d")).made_already(output, None)
    other = Artifact(source.folder, source.manifest, "0" * 64)
    assert not Draft("models/base/p", '{"x":1}', {"data/mix/m": other}, Path("d")).made_already(output, None)
    there = artifacts.identity(output)
    assert not Draft("models/base/p", '{"x":1}', inputs, Path("d")).made_already(output, there)
    _flip(output.parent)
    assert not Draft("models/base/p", '{"x":1}', inputs, Path("d")).made_already(output, None)


def test_addresses_are_read_back_from_paths() -> None:
    from llmfusion.study.graph import output_of

    for address in ("models/base/p", "data/generated/base/a/m", "scores/merged/x.y/t-1.5", "tables/t2", "tables/t.v2"):
        assert address_of(output_of(address)) == address


def test_a_write_that_fails_leaves_the_old_file_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == b"old"


def test_require_speaks_to_the_user() -> None:
    artifacts.require(True, "never")
    with pytest.raises(UserError, match="give less"):
        artifacts.require(False, "give less")


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("results/table2.csv", ""),
        ("runs/mini/results/table2.json", "runs/mini"),
        ("/data/results/x/results/scores/base/p/t.json", "/data/results/x"),
        ("results/models/base/results/manifest.json", ""),
        ("a/results/data/mix/results/manifest.json", "a"),
        ("results/results/models/base/p/manifest.json", "results"),
    ],
)
def test_the_results_folder_of_a_path_is_the_one_its_address_follows(path: str, folder: str) -> None:
    assert Path(*Path(path).parts[: results_index(path)]) == Path(folder)


def test_a_path_outside_any_results_is_refused() -> None:
    with pytest.raises(UserError, match="lies in no results/ folder"):
        results_index("models/base/p/manifest.json")
