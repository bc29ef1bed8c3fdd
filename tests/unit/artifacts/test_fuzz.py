"""Every sort of damage to an artifact is refused by the next job that reads it, and by ``llmfusion verify``.

In one sentence that names the file, without a traceback, without waiting, and with nothing published. What no reader
can notice is proven to change nothing.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmfusion.artifacts import provenance
from llmfusion.artifacts.job import Job, Request, run_job
from llmfusion.artifacts.store import read
from llmfusion.cli.main import main
from llmfusion.study.addresses import FINGERPRINTS, address_of, manifest_of, output_of
from tests.damages import ADDED, FILE_ENTRIES, FORGERIES, OF_A_FILE, OF_A_MANIFEST, Damage

MODEL, OTHER, SCORE, OTHER_SCORE, TABLE = (
    "models/base/p",
    "models/base/q",
    "scores/base/p/t",
    "scores/base/p/u",
    "tables/t",
)
READER = "models/trained/r"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with artifacts of each shape."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(provenance, "_git", lambda: None)
        for address in (MODEL, OTHER):
            make(address, "a.bin", "sub/b.json")
        for address in (SCORE, OTHER_SCORE):
            make(address)
        make(TABLE, "t.csv", "t.md")
    return place


@pytest.fixture(autouse=True)
def _study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the finished study, as the working directory; nothing here may wait for ever."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "_git", lambda: None)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for ever"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(address: str, *names: str, spec: str = '{"n":1}', inputs: tuple[str, ...] = ()) -> None:
    def build(job: Job) -> None:
        for name in names:
            (job.folder / name).parent.mkdir(exist_ok=True)
            (job.folder / name).write_text(f"{address} {name} {job.spec} " + "content " * 20)
        job.facts.update(license="mit", of=address)

    run_job(Request(spec, Path(output_of(address)), [output_of(source) for source in inputs]), build)


def refusal(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a step says that reads an artifact; it must fail, publish nothing and leave nothing."""
    capsys.readouterr()

    def never(job: Job) -> None:
        raise AssertionError(f"{address} was read")

    monkeypatch.setattr("llmfusion.steps.score.build", never)
    words = ["step", "score", "--spec", "{}", "--out", output_of(READER), "--inputs", str(manifest_of_address(address))]
    assert main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert message.count("\n") == 1, message
    assert "Traceback" not in message
    assert not Path(output_of(READER)).parent.exists()
    assert list(Path("work").rglob("lease*")) == []
    return message


def manifest_of_address(address: str) -> Path:
    return manifest_of(Path(output_of(address)))


def verified(address: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    target = Path(output_of(address))
    status = main(["verify", str(target)])
    return status, capsys.readouterr().err


def assert_refused(
    address: str, named: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(named) in refusal(address, monkeypatch, capsys)
    status, errors = verified(address, capsys)
    assert status in (1, 2)  # 2: there is nothing any more
    assert str(named) in errors
    assert "Traceback" not in errors


MANIFESTS = {
    (address, name): damage
    for address in (MODEL, SCORE, TABLE)
    for table in (OF_A_FILE, OF_A_MANIFEST, FORGERIES)
    for name, damage in table.items()
} | {(address, name): damage for address in (MODEL, TABLE) for name, damage in FILE_ENTRIES.items()}
FILES = {
    (address, file, name): damage
    for address, files in ((MODEL, ("a.bin", "sub/b.json")), (TABLE, ("t.csv", "t.md")))
    for file in files
    for name, damage in OF_A_FILE.items()
}


def test_there_are_more_than_forty_damages_of_each_shape_of_artifact() -> None:
    for address in (MODEL, SCORE, TABLE):
        assert sum(case[0] == address for case in [*MANIFESTS, *FILES]) > 40, address


@pytest.mark.parametrize("case", MANIFESTS, ids=" ".join)
def test_a_damaged_manifest_is_refused(
    case: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of_address(case[0])
    MANIFESTS[case](manifest)
    is_about_a_file = "listed" in case[1] or case[1] in FILE_ENTRIES  # then that file may be what is named
    assert_refused(case[0], manifest.parent if is_about_a_file else manifest, monkeypatch, capsys)


@pytest.mark.parametrize("case", FILES, ids=" ".join)
def test_a_damaged_file_is_refused(
    case: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest_of_address(case[0]).parent / case[1]
    FILES[case](path)
    assert_refused(case[0], path, monkeypatch, capsys)


@pytest.mark.parametrize("case", ADDED)
def test_something_more_in_an_artifacts_folder_is_refused(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, name = ADDED[case]
    damage(manifest_of_address(MODEL))
    assert_refused(MODEL, Path(output_of(MODEL)).parent / name, monkeypatch, capsys)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _swap_folders() -> Path:
    swap(Path(output_of(MODEL)).parent, Path(output_of(OTHER)).parent)
    return Path(output_of(MODEL))


def _copy_over() -> Path:
    shutil.rmtree(Path(output_of(MODEL)).parent)
    shutil.copytree(Path(output_of(OTHER)).parent, Path(output_of(MODEL)).parent)
    return Path(output_of(MODEL))


def _link_over() -> Path:
    shutil.rmtree(Path(output_of(MODEL)).parent)
    Path(output_of(MODEL)).parent.symlink_to(Path(output_of(OTHER)).parent.absolute())
    return Path(output_of(MODEL))


def _swap_files() -> Path:
    folder = Path(output_of(MODEL)).parent
    swap(folder / "a.bin", folder / "sub/b.json")
    return folder / "a.bin"


def _swap_manifests() -> Path:
    swap(Path(output_of(MODEL)), Path(output_of(OTHER)))
    return Path(output_of(MODEL))


def _rename_a_file() -> Path:
    folder = Path(output_of(MODEL)).parent
    (folder / "a.bin").rename(folder / "A.bin")
    return folder / "a.bin"


@pytest.mark.parametrize(
    "damage", [_swap_folders, _copy_over, _link_over, _swap_files, _swap_manifests, _rename_a_file]
)
def test_what_was_swapped_or_put_under_another_name_is_refused(
    damage: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(MODEL, damage(), monkeypatch, capsys)


def test_swapped_scores_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    swap(Path(output_of(SCORE)), Path(output_of(OTHER_SCORE)))
    assert_refused(SCORE, Path(output_of(SCORE)), monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------ of another study
def record_plan(spec: str = "{}") -> None:
    """What Snakemake writes before the first job: the fingerprints that the study asks for."""
    from llmfusion.io.digests import fingerprint_of

    model = read(output_of(MODEL)).manifest["fingerprint"]
    FINGERPRINTS.write_text(json.dumps({MODEL: model, READER: fingerprint_of(spec, [model])}))


def test_an_artifact_of_the_same_address_and_another_spec_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_plan()
    make(MODEL, "a.bin", spec='{"n":2}')  # as if it were copied here from another study
    message = refusal(MODEL, monkeypatch, capsys)
    assert f"{output_of(MODEL)}: was made by another study or with other settings (fingerprint " in message
    assert f"make it again with: snakemake {output_of(MODEL)} -f" in message


def test_an_artifact_made_elsewhere_from_the_same_spec_is_taken() -> None:
    record_plan()
    make(MODEL, "c.bin")  # other bytes, of the same spec
    make(READER, "a.bin", spec="{}", inputs=(MODEL,))
    assert read(output_of(READER)).manifest["inputs"] == {MODEL: read(output_of(MODEL)).sha256}


@pytest.mark.parametrize("plan", [b"", b"[]", b'{"models/base/p": 3}', b'{"models/trained/r": "0"}', b"[" * 100_000])
def test_a_list_of_fingerprints_that_is_damaged_or_of_another_study_asks_nothing(plan: bytes) -> None:
    FINGERPRINTS.write_bytes(plan)
    make(READER, "a.bin", spec="{}", inputs=(MODEL,))
    assert read(output_of(READER)).facts["of"] == READER


# ------------------------------------------------------------------------------------------------ harmless
def _touch(path: Path) -> None:
    os.utime(path, (0, 0))


HARMLESS: dict[str, Damage] = {
    "an old time": _touch,
    "a time in the future": lambda path: os.utime(path, (2**33, 2**33)),
    "other rights": lambda path: path.chmod(0o600),
    "a file of the file system's own": lambda path: (path.parent / ".nfs0001").touch(),
    "an empty folder": lambda path: (path.parent / "empty").mkdir(exist_ok=True),
    "a copy with the same bytes": lambda path: (
        shutil.copy(path, path.with_name(".nfs0")),
        os.replace(path.with_name(".nfs0"), path),
    ),
    "no provenance": lambda path: (path.parent / "provenance.json").unlink(missing_ok=True),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("file", ["a.bin", "manifest.json"])
def test_what_changes_no_byte_changes_no_result(name: str, file: str) -> None:
    make(READER, "a.bin", inputs=(MODEL,))
    whole = read(output_of(READER)).manifest
    shutil.rmtree(Path(output_of(READER)).parent)
    HARMLESS[name](Path(output_of(MODEL)).parent / file)
    make(READER, "a.bin", inputs=(MODEL,))
    assert read(output_of(READER)).manifest == whole


def test_a_linked_folder_of_the_same_artifact_is_read_as_the_folder_itself(tmp_path: Path) -> None:
    """Results may lie on another disk, or be another clone's."""
    folder = Path(output_of(MODEL)).parent
    before = read(output_of(MODEL)).manifest
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert read(output_of(MODEL)).manifest == before


# ------------------------------------------------------------------------------------------------ provenance
def provenance_record(address: str) -> Path:
    from llmfusion.study.addresses import provenance_of

    return provenance_of(Path(output_of(address)))


def _of_another(path: Path) -> None:
    other = {MODEL: OTHER, SCORE: OTHER_SCORE, TABLE: OTHER}[address_of(manifest_beside(path))]
    shutil.copyfile(provenance_record(other), path)


def manifest_beside(path: Path) -> Path:
    if path.name == "provenance.json":
        return path.with_name("manifest.json")
    return path.with_name(path.name.replace(".provenance.json", ".json"))


PROVENANCES: dict[str, Damage] = {
    **{name: damage for name, damage in OF_A_FILE.items() if name not in ("one byte more", "a byte order mark")},
    "that of another artifact": _of_another,
    "another host": lambda path: path.write_text(path.read_text().replace('"host": "', '"host": "x')),
    "a list": lambda path: path.write_text("[]"),
    "NaN": lambda path: path.write_text('{"seconds": NaN, "manifest": "0"}'),
    "an empty object": lambda path: path.write_text("{}"),
    "of no version": lambda path: path.write_text('{"seconds": 1.0}'),
    "only its own hash": lambda path: path.write_text('{"sha256": "0"}'),
}


@pytest.mark.parametrize("name", PROVENANCES)
@pytest.mark.parametrize("address", [MODEL, SCORE, TABLE])
def test_a_damaged_provenance_is_named_by_verify_and_hinders_no_job(
    name: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = provenance_record(address)
    PROVENANCES[name](path)
    status, errors = verified(address, capsys)
    assert status == 1
    assert str(path) in errors
    make(READER, "a.bin", inputs=(MODEL,))


@pytest.mark.parametrize("address", [MODEL, SCORE, TABLE])
def test_a_provenance_of_an_earlier_version_is_accepted(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = provenance_record(address)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("sha256", "manifest")}))
    assert verified(address, capsys) == (0, "")


# ------------------------------------------------------------------------------------------------ of no artifact
STRANGERS = {
    "results/notes.txt": "file",
    "results/notes.json": "file",
    "results/scores/base/p/more.json": "file",
    "results/scores/base/p/t.txt": "file",
    "results/models/base/loose.safetensors": "file",
    "results/models/base/empty/half.bin": "file",
    "results/t.pdf": "file",
    "results/pipe": "fifo",
    "results/models/link": "link",
    "results/models/base/q/more.bin": "file",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_belongs_to_no_artifact_is_named_by_verify(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = STRANGERS[name]
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/nowhere") if kind == "link" else path.write_text("{}")
    status, errors = verified(TABLE, capsys)
    assert status == 1
    assert errors == f"mismatch: {name}: belongs to no artifact of the study: move it away\n"


@pytest.mark.parametrize("damage", ["copied", "truncated"])
def test_a_folder_whose_manifest_is_not_its_own_is_named_by_verify_though_nothing_was_made_from_it(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path("results/models/base/copy")
    shutil.copytree(manifest_of(Path(output_of(MODEL))).parent, copy)
    if damage == "truncated":
        os.truncate(copy / "manifest.json", 50)
    assert verified(TABLE, capsys) == (
        1,
        f"mismatch: {copy}/manifest.json: belongs to no artifact of the study: move it away\n",
    )


@pytest.mark.parametrize(
    "name",
    [
        "results/cost.csv",
        "results/report.html",
        "results/t.cost.csv",
        "results/.t.csv.0123456789ab.draft/t.csv",
        "results/.nfs01",
    ],
)
def test_reports_drafts_of_running_jobs_and_the_file_systems_own_files_belong(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("x")
    assert verified(TABLE, capsys) == (0, "")


def test_a_folder_that_is_linked_into_itself_is_walked_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("results/models/again").symlink_to(Path("results").absolute())
    assert verified(TABLE, capsys)[0] == 0
