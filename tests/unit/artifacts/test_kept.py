"""What Snakemake deletes before it starts a job comes back when the job does not make it again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmfusion.artifacts import kept
from llmfusion.artifacts.job import Job, Request, run_job
from llmfusion.artifacts.lease import Lease
from llmfusion.artifacts.store import draft_folder
from llmfusion.study.addresses import output_of
from llmfusion.study.graph import PlannedArtifact

BASE = "models/base/p"
CELL = "scores/base/p/t"
TABLE = "tables/table2"
SPEC = '{"n":1}'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def build(job: Job) -> None:
    for suffix in ("csv", "md") if "table2" in job.folder.name else ():
        (job.folder / f"table2.{suffix}").write_text(suffix)
    job.facts["n"] = 1


def make(address: str, *inputs: str, spec: str = SPEC) -> None:
    run_job(Request(spec, Path(output_of(address)), [output_of(one) for one in inputs]), build)
    record = kept._record(Path(output_of(address)))
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("as it was made")


def outputs(address: str) -> list[Path]:
    return kept._outputs(Path(output_of(address)))


def content(*addresses: str) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for address in addresses
        for path in outputs(address)
        if path.exists()
    }


def deleted_by_snakemake(address: str) -> None:
    for path in outputs(address):
        path.unlink()
    kept._record(Path(output_of(address))).write_text("of the job that failed")


def planned(address: str, *inputs: str, spec: str = SPEC) -> dict[str, PlannedArtifact]:
    return {address: PlannedArtifact([*inputs], spec, "", [])}


@pytest.mark.parametrize("address", [BASE, CELL, TABLE])
def test_what_a_job_did_not_make_again_is_put_back_with_snakemakes_record_of_it(address: str) -> None:
    make(address)
    before = content(address)
    assert len(before) == (3 if address == TABLE else 1)
    kept.keep([address])
    deleted_by_snakemake(address)
    assert content(address) == {}
    assert kept.put_back(planned(address)) == [output_of(address)]
    assert content(address) == before
    assert kept._record(Path(output_of(address))).read_text() == "as it was made"
    assert not Path("work/kept").exists()


def test_what_a_killed_job_left_of_the_successor_goes_when_the_old_one_is_put_back() -> None:
    make(BASE)
    kept.keep([BASE])
    deleted_by_snakemake(BASE)
    draft = draft_folder(Path(output_of(BASE)), "0123456789abcdef")
    draft.mkdir()
    (draft / "half.safetensors").write_text("x")
    with Lease(Path("work") / BASE / "lease"):
        assert (kept.put_back(planned(BASE)), draft.exists()) == ([], True)
    assert (kept.put_back(planned(BASE)), draft.exists()) == ([output_of(BASE)], False)


@pytest.mark.parametrize("place", ["work", "work/kept", "work/kept/models", "work/kept/models/base/.p"])
def test_nothing_is_started_where_no_copy_can_be_kept(place: str) -> None:
    make(BASE)
    if place == "work":
        shutil.rmtree(place)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).symlink_to("/dev/full")
    job = SimpleNamespace(output=[output_of(BASE)])
    workflow = SimpleNamespace(is_main_process=True, dag=SimpleNamespace(needrun_jobs=lambda: [job]))
    graph = SimpleNamespace(artifacts=planned(BASE))
    with pytest.raises(SystemExit, match=f"^{place}.*: cannot be written .*; nothing was started$"):
        kept.keep_outputs(workflow, graph)  # type: ignore[arg-type]


def test_what_cannot_be_put_back_is_named_and_the_rest_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    make(BASE)
    make(CELL)
    kept.keep([BASE, CELL])
    for address in (BASE, CELL):
        deleted_by_snakemake(address)
    (Path("work/kept") / BASE / "provenance.json").unlink()
    assert kept.put_back(planned(BASE) | planned(CELL)) == [output_of(CELL)]
    assert f"{output_of(BASE)}: cannot be put back from work/kept/{BASE}: No such file" in caplog.text


def test_what_was_made_again_is_left_alone_and_forgotten() -> None:
    make(BASE)
    kept.keep([BASE])
    deleted_by_snakemake(BASE)
    make(BASE)
    after = content(BASE)
    assert kept.put_back(planned(BASE)) == []
    assert content(BASE) == after
    assert not Path("work/kept").exists()


def test_an_artifact_that_is_not_there_is_not_kept() -> None:
    kept.keep([BASE, TABLE])
    make(TABLE)
    Path("results/table2.md").unlink()
    kept.keep([TABLE])
    assert not Path("work/kept").exists()


def changed_spec() -> dict[str, PlannedArtifact]:
    return planned(BASE, spec='{"n":2}')


def changed_input() -> dict[str, PlannedArtifact]:
    make("models/base/q", spec='{"n":3}')
    return planned(BASE)


def published_meanwhile() -> dict[str, PlannedArtifact]:
    make(BASE)
    Path(output_of(BASE)).unlink()
    return planned(BASE)


def newer_file() -> dict[str, PlannedArtifact]:
    Path("own.jsonl").write_text("")
    return planned(BASE, str(Path("own.jsonl").absolute()))


@pytest.mark.parametrize("change", [changed_spec, changed_input, published_meanwhile, newer_file])
def test_what_the_study_would_make_again_or_is_of_something_else_is_not_put_back(
    change: Callable[[], dict[str, PlannedArtifact]],
) -> None:
    make("models/base/q")
    make(BASE, "models/base/q") if change is changed_input else make(BASE)
    kept.keep([BASE])
    deleted_by_snakemake(BASE)
    assert kept.put_back(change()) == []
    assert not Path(output_of(BASE)).exists()


def test_a_setting_that_is_taken_back_finds_its_artifact_again() -> None:
    make(BASE)
    before = content(BASE)
    kept.keep([BASE])
    deleted_by_snakemake(BASE)
    assert kept.put_back(planned(BASE, spec='{"n":2}')) == []  # the changed setting's job has failed
    kept.keep([BASE])  # of its next attempt
    assert kept.put_back(planned(BASE)) == [output_of(BASE)]
    assert content(BASE) == before


def test_nothing_is_put_back_while_somebody_makes_it() -> None:
    make(BASE)
    kept.keep([BASE])
    deleted_by_snakemake(BASE)
    with Lease(Path("work") / BASE / "lease"):
        assert kept.put_back(planned(BASE)) == []
    assert kept.put_back(planned(BASE)) == [output_of(BASE)]


def test_an_artifact_that_was_removed_as_a_whole_is_not_put_back() -> None:
    make(BASE)
    kept.keep([BASE])
    shutil.rmtree(Path(output_of(BASE)).parent)
    assert kept.put_back(planned(BASE)) == []


def test_the_place_of_a_record_is_the_one_of_snakemake(tmp_path: Path) -> None:
    from snakemake.persistence.file import FilePersistence

    persistence = FilePersistence(path=tmp_path / ".snakemake")
    for name in ("results/a/manifest.json", f"results/{'b' * 80}/{'c' * 80}/{'d' * 80}/{'e' * 80}/manifest.json"):
        found = persistence._record_path(persistence._metadata_path, name)
        assert Path(found) == tmp_path / kept._record(Path(name))
