"""``llmfusion doctor``: what is missing is told with its remedy, and the token's value never."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from llmfusion.cli import doctor
from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.study.load import read_study
from llmfusion.study.scales import SCALES
from llmfusion.study.schema.study import Study
from tests.project import ROOT, study


@pytest.fixture
def mini(tmp_path: Path) -> Study:
    return read_study(study(tmp_path / "mini.yaml", lambda content: content.update(directory=str(tmp_path / "runs"))))


def test_the_miniature_study_can_be_made_here_and_every_check_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study(tmp_path / "mini.yaml", lambda content: content.update(directory=str(tmp_path / "runs")))
    assert main(["doctor", str(file)]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ok", name] for name in ("study", *doctor.CHECKS)]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_mistaken_study_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study(tmp_path / "bad.yaml", lambda content: content.update(scale="huge"))
    assert main(["doctor", str(file)]) == 2
    captured = capsys.readouterr()
    assert "scale" in captured.err
    assert captured.out == ""


def test_a_missing_sandbox_is_an_exit_status_and_only_where_programs_are_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise UserError("bubblewrap does not work here: apt install bubblewrap")

    def without_code(content: dict) -> None:
        content.update(
            directory=str(tmp_path / "runs"), batches={"all": ["mmlu"]}, tasks={"mmlu": content["tasks"]["mmlu"]}
        )
        content["tables"]["table2"]["tasks"] = ["mmlu"]
        content["mixes"]["student"]["against"] = ["mmlu"]

    monkeypatch.setattr(doctor, "require_isolation", refuse)
    file = study(tmp_path / "mini.yaml", lambda content: content.update(directory=str(tmp_path / "runs")))
    assert main(["doctor", str(file)]) == 1
    assert "MISSING  sandbox  bubblewrap does not work here: apt install bubblewrap" in capsys.readouterr().out
    assert main(["doctor", str(study(tmp_path / "plain.yaml", without_code))]) == 0


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free=size))


def test_a_disk_that_is_too_small_is_told_as_the_estimate_tells_it(
    mini: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.disk(mini).verdict == "ok"
    free(monkeypatch, 10**6)
    found = doctor.disk(mini)
    assert found.verdict == "MISSING"
    assert "free some, or set the study's 'directory' to a larger place" in found.text
    assert main(["estimate", str(tmp_path / "mini.yaml")]) == 1
    assert f"disk: {found.text}" in capsys.readouterr().err


def test_a_place_that_cannot_hold_a_lease_is_refused(mini: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor.os, "link", no_links)
    assert doctor.disk(mini).verdict == "MISSING"


def test_sizes_that_are_not_known_yet_are_named(tmp_path: Path) -> None:
    def unknown(content: dict) -> None:
        pivot = {"kind": "path", "path": "not-there/pivot", "vocabulary": "v", "license": "mit"}
        content["models"]["base"]["pivot"] = pivot
        content["directory"] = str(tmp_path / "runs")

    found = doctor.disk(read_study(study(tmp_path / "own.yaml", unknown)))
    assert found.verdict == "note"
    assert "not counted: what is made from base/pivot, whose size nothing tells yet" in found.text


def test_a_study_of_small_models_expects_no_gpu(mini: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "GPU_DRIVER", Path("/nowhere"))
    verdicts = {scale: doctor.gpu(mini.model_copy(update={"scale": scale})).verdict for scale in SCALES}
    assert verdicts == {"paper": "note", "small": "ok", "miniature": "ok"}


def test_the_token_is_never_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paper = read_study(ROOT / "config/config.yaml")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert doctor.token(paper).verdict == "ok"
    assert "verysecret" not in doctor.token(paper).text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = doctor.token(paper)
    assert found.verdict == "note"
    assert "set HF_TOKEN" in found.text
