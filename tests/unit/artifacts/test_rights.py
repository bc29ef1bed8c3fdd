"""Who may read what is published: nobody who could not read what it was made from; a group's shared folder works."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmfusion.artifacts.job import Job, Request, run_job
from llmfusion.artifacts.store import read
from llmfusion.io.files import link_or_copy, plain_file
from llmfusion.study.addresses import output_of


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def modes(address: str) -> dict[str, int]:
    """Permission bits of all that was published at an address: of its folder, or of the files beside others."""
    output = Path(output_of(address))
    if output.name == "manifest.json":
        paths = [output.parent, *output.parent.rglob("*")]
    else:
        paths = [path for path in output.parent.iterdir() if path.name.startswith(f"{output.stem}.")]
    return {path.name: mode(path) for path in paths}


def nothing(job: Job) -> None:
    pass


def make(address: str, *inputs: str, before: Callable[[Job], None] = nothing) -> None:
    def build(job: Job) -> None:
        before(job)
        names = ("t.csv", "t.md") if address.startswith("tables/") else ("a.txt", "sub/b.bin", "private.safetensors")
        for name in () if address.startswith("scores/") else names:
            (job.folder / name).parent.mkdir(exist_ok=True)
            (job.folder / name).write_text(address)
            if name.startswith("private"):
                (job.folder / name).chmod(0o600)  # as safetensors makes its files, whoever may read them
        (job.work / "state").write_text("resume")

    run_job(Request("{}", Path(output_of(address)), [output_of(source) for source in inputs]), build)


@pytest.mark.parametrize(
    ("umask", "file", "folder"),
    [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700), (0o027, 0o640, 0o750)],
)
def test_files_and_folders_get_what_the_umask_allows(umask: int, file: int, folder: int) -> None:
    os.umask(umask)
    for address in ("models/base/p", "scores/base/p/t", "tables/t"):
        make(address)
        for name, found in modes(address).items():
            assert found == (folder if name in ("p", "sub") else file), name


@pytest.mark.parametrize(
    ("source", "file", "folder"), [(0o600, 0o600, 0o700), (0o640, 0o640, 0o750), (0o644, 0o644, 0o755)]
)
def test_what_is_made_from_a_private_file_is_private_and_so_is_what_is_made_from_that(
    tmp_path: Path, source: int, file: int, folder: int
) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text("{}")
    given.chmod(source)
    seen = []

    def read_it(job: Job) -> None:
        job.restrict_to_readers_of(given)
        seen.append((mode(job.folder) & 0o777, mode(job.work) & 0o777))

    make("data/dataset/d", before=read_it)
    assert seen == [(folder, folder)]  # also while it is being made, and its resume state
    make("models/base/p", "data/dataset/d")
    make("scores/base/p/t", "models/base/p")
    make("tables/t", "scores/base/p/t")
    for address in ("data/dataset/d", "models/base/p", "scores/base/p/t", "tables/t"):
        for name, found in modes(address).items():
            assert found == (folder if name in ("d", "p", "sub") else file), (address, name)


def test_a_folder_that_only_its_owner_may_enter_is_private_although_its_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir(mode=0o700)
    (folder / "a.txt").write_text("x")
    make("models/base/p", before=lambda job: job.restrict_to_readers_of(folder))
    assert modes("models/base/p")["p"] == 0o700


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin"])
def test_what_is_made_from_an_artifact_with_one_private_file_is_private(name: str) -> None:
    make("models/base/p")
    Path("results/models/base/p", name).chmod(0o640)
    make("models/trained/q", "models/base/p")
    make("scores/trained/q/t", "models/trained/q")
    found = modes("models/trained/q") | modes("scores/trained/q/t")
    assert {found["q"], found["sub"]} == {0o750}
    assert {found["a.txt"], found["manifest.json"], found["t.json"]} == {0o640}


def test_a_groups_shared_folder_stays_shared(tmp_path: Path) -> None:
    """The setgid bit hands the group down, with umask 002 the group may write: a colleague makes an artifact again."""
    os.umask(0o002)
    (tmp_path / "results").mkdir()
    os.chmod(tmp_path / "results", 0o2775)
    for _ in range(2):
        make("models/base/p")
    found = modes("models/base/p")
    assert (found["p"], found["sub"], found["a.txt"], found["manifest.json"]) == (0o2775, 0o2775, 0o664, 0o664)
    make("models/trained/q", "models/base/p")
    assert modes("models/trained/q")["q"] == 0o2775


def test_a_hard_link_to_somebody_elses_name_keeps_its_rights(tmp_path: Path) -> None:
    source = tmp_path / "weights.safetensors"
    source.write_text("x")
    source.chmod(0o600)
    make("models/base/p", before=lambda job: link_or_copy(source, job.folder / "weights.safetensors"))
    assert (mode(source), modes("models/base/p")["weights.safetensors"]) == (0o600, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_colleagues_file_is_copied_and_not_linked(tmp_path: Path) -> None:
    """A link to it would be refused by the next reader (:func:`plain_file`)."""
    source = tmp_path / "piece.safetensors"
    source.write_text("x")
    os.chown(source, 12345, -1)
    source.chmod(0o640)
    make("models/base/p", before=lambda job: link_or_copy(source, job.folder / "piece.safetensors"))
    published = Path("results/models/base/p/piece.safetensors")
    assert published.stat().st_ino != source.stat().st_ino
    assert plain_file(published.parent, published.name).read_text() == "x"
    read("results/models/base/p/manifest.json")


# ------------------------------------------------------------------------------------------------ closed places
def as_somebody_else(act: Callable[[], None]) -> str:
    """What ``act`` raises in a process that is not the super-user, as text; empty if nothing."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            act()
        except BaseException as error:  # whatever it is, it is the result
            os.write(sending, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(sending)
    os.waitpid(pid, 0)
    with open(receiving, "rb") as file:
        return file.read().decode()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's folder that somebody else may use, below one that everybody may enter."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    place = tmp_path / "study"
    place.mkdir()
    place.chmod(0o777)
    monkeypatch.chdir(place)
    make("models/base/p")
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
        folder.chmod(0o777)
    return place


CLOSED: dict[str, tuple[str, int]] = {  # with the part of the path that the message names
    "results/models/trained": ("results/models/trained", 0o555),
    "work/models/trained": ("work/models/trained", 0o555),
    "results/models/base/p/manifest.json": (
        "results/models/base/p/manifest.json: cannot be read: Permission denied",
        0,
    ),
    "results/models/base/p/a.txt": ("results/models/base/p/a.txt: cannot be read: Permission denied", 0),
    "results/models/base/p": ("results/models/base/p", 0),
    "results": ("results", 0),
    "work": ("work", 0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_place_that_may_not_be_read_or_written_is_named_in_one_sentence(place: Path, name: str) -> None:
    named, rights = CLOSED[name]
    for folder in ("results/models/trained", "work/models/trained"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder).chmod(0o777)
    Path(name).chmod(rights)
    raised = as_somebody_else(lambda: make("models/trained/q", "models/base/p"))
    Path(name).chmod(0o755)
    assert raised.startswith(("UserError: ", "DamagedError: ")), raised
    assert named in raised
    assert "Permission denied" in raised
    assert "\n" not in raised
    assert not Path("results/models/trained/q").exists()


@pytest.mark.parametrize("name", ["results", "work", "results/models", "work/models", "work/models/trained/q"])
def test_a_file_where_a_folder_is_expected_is_named_in_one_sentence(place: Path, name: str) -> None:
    for folder in ("results", "work"):
        Path(folder).rename(f"old-{folder}")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("a file")
    raised = as_somebody_else(lambda: make("models/trained/q"))
    assert raised.startswith("UserError: "), raised
    assert name in raised
    assert "a study's folders must be folders that this user may read and write" in raised


def test_a_memory_of_hashes_that_cannot_be_written_costs_only_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmfusion.artifacts.store.REMEMBER_BYTES", 1)
    Path("work/verified").mkdir(exist_ok=True)
    Path("work/verified").chmod(0o555)
    assert as_somebody_else(lambda: read("results/models/base/p/manifest.json") and None) == ""
