"""``llmfusion verify`` as a user types it: every hash on the way, licences, and what is no result."""

import json
from pathlib import Path

import pytest

from llmfusion.artifacts.store import Artifact, Draft, draft_folder, publish, read
from llmfusion.cli.main import main
from llmfusion.study.addresses import output_of


def make(address: str, text: str = "text", *sources: str, **facts: object) -> Artifact:
    """Publish an artifact of one file that was made from ``sources``."""
    output = Path(output_of(address))
    draft = Draft(
        address,
        "{}",
        {source: read(output_of(source)) for source in sources},
        draft_folder(output, "token"),
        dict(facts),
    )
    draft.folder.mkdir(parents=True)
    (draft.folder / "a.txt").write_text(text)
    publish(draft, output, {})
    return read(output)


@pytest.fixture(autouse=True)
def _two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("data/dataset/d", license="mit")
    make("models/base/p", "text", license="apache-2.0")
    make("models/trained/t", "text", "models/base/p", "data/dataset/d")


TARGET = "results/models/trained/t/manifest.json"


def test_everything_behind_a_result_is_hashed_and_licences_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", TARGET]) == 0
    lines = capsys.readouterr().out.splitlines()
    dataset = read(output_of("data/dataset/d")).sha256
    assert lines[0] == f"data/dataset/d  {dataset[:16]}  licence: mit"
    assert lines[1].endswith("licence: apache-2.0")
    assert lines[2] == f"{TARGET}: 3 artifacts, 0.0 MB hashed, 2 datasets, task sets and base models: all match"


def test_all_mismatches_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    old = read(output_of("models/base/p")).sha256
    new = make("models/base/p", "other", license="apache-2.0").sha256
    Path("results/data/dataset/d/a.txt").write_text("tex_")
    assert main(["verify", TARGET]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("2 MISMATCHES")
    changed, damaged = sorted(printed.err.splitlines(), reverse=True)
    made_from = f"was made from another models/base/p (manifest {old[:16]}, now {new[:16]}); make it again"
    assert changed == f"mismatch: {TARGET}: {made_from}"
    assert damaged.startswith("mismatch: results/data/dataset/d/a.txt: damaged: expected sha256 ")


@pytest.mark.parametrize(
    ("target", "message"),
    [("results/absent.csv", "is not there"), ("elsewhere/manifest.json", "lies in no results/ folder of a study")],
)
def test_what_is_no_result_is_a_mistake_of_usage(capsys: pytest.CaptureFixture[str], target: str, message: str) -> None:
    if target.startswith("elsewhere"):
        Path("elsewhere").mkdir()
        Path(target).write_text("{}")
    assert main(["verify", target]) == 2
    assert message in capsys.readouterr().err


def test_an_artifact_of_no_kind_that_is_known_is_verified_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    make("ensembles/of/two", "text", "models/base/p")
    assert main(["verify", "results/ensembles/of/two/manifest.json"]) == 0
    assert "2 artifacts" in capsys.readouterr().out


def test_a_table_is_found_by_its_file() -> None:
    Path("results/t.csv").write_text("a\n")
    Path("results/t.json").write_text(json.dumps({}))
    assert main(["verify", "results/t.csv", TARGET]) == 1
