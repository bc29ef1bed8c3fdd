"""A study over several seeds: what is drawn and trained anew, what is shared, and that the whole is a sound study."""

from pathlib import Path
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.cli.main import main
from llmfusion.study.load import read_study
from llmfusion.study.replicate import replicated
from llmfusion.study.snakemake import checked
from tests.unit.mini_study import MINI, small


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return replicated(read_study(MINI).model_dump(mode="json", by_alias=True, exclude_defaults=True), [5, 6, 7], 2)


def test_students_are_made_once_a_seed_and_base_models_once_a_set(made: dict[str, Any]) -> None:
    models = made["models"]
    assert set(models["base"]) == {f"{name}-{end}" for name in ("pivot", "code", "math") for end in "ab"}
    assert {name for name in models["trained"] if name.startswith("kd-code")} == {
        "kd-code-s5",
        "kd-code-s6",
        "kd-code-s7",
    }
    one, two, three = (models["trained"][f"kd-code-s{seed}"] for seed in (5, 6, 7))
    assert (one["init"], two["init"], three["init"]) == ("base/pivot-a", "base/pivot-b", "base/pivot-a")
    assert (one["teachers"], two["teachers"]) == (["base/code-a"], ["base/code-b"])
    assert (one["mix"], one["seed"], two["seed"]) == ("student-s5", 5, 6)
    assert models["merged"]["ta-homogeneous-s6"]["parents"] == ["trained/kd-code-s6", "trained/kd-math-s6"]
    assert models["base"]["code-b"]["init"] == "base/pivot-b"
    assert models["base"]["pivot-a"]["seed"] != models["base"]["pivot-b"]["seed"]


def test_noise_and_mix_are_drawn_anew_for_each_seed(made: dict[str, Any]) -> None:
    assert made["mixes"]["student-s5"]["seed"] == 5
    assert made["mixes"]["student-s5"]["datasets"]["noisy-code-s5"] == 450
    assert made["datasets"]["noisy-code-s6"]["seed"] == 6
    assert made["mixes"]["student-s6"]["tokenizers"] == ["base/pivot-b", "base/code-b", "base/math-b"]


def test_the_table_has_a_row_of_replicates_for_every_student(made: dict[str, Any]) -> None:
    rows = made["tables"]["seeds"]["rows"]
    assert rows[0]["model"] == ["trained/sft-s5", "trained/sft-s6", "trained/sft-s7"]
    assert all(model.startswith(("trained/", "merged/")) for row in rows for model in row["model"])


def test_the_command_writes_a_sound_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replicate", str(MINI), str(tmp_path / "seeds.yaml"), "--seeds", "1", "2", "--sets", "1"]) == 0
    study, graph = checked(tmp_path / "seeds.yaml")
    assert study.directory == "runs/mini-seeds"
    assert "tables/seeds" in graph.artifacts
    assert main(["replicate", str(MINI), str(tmp_path / "seeds.yaml"), "--seeds", "1", "--sets", "2"]) == 2
    assert "give at least as many seeds as sets" in capsys.readouterr().err


def test_the_seeds_study_begins_with_its_command_and_is_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("mini-seeds.yaml", "again.yaml"):
        assert main(["replicate", str(ROOT / "config/mini.yaml"), str(tmp_path / name), "--sets", "2"]) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith("# Written by: llmfusion replicate mini.yaml --seeds 1 2 3 4 --sets 2\n")
    study, graph = checked(tmp_path / "mini-seeds.yaml")
    assert len(study.tables["seeds"].rows[0].models) == 4
    assert len(graph.artifacts) == 1176


def test_the_study_itself_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(MINI.read_text())
    assert main(["replicate", str(file), str(file)]) == 2
    assert "is the study itself; name another file to write" in capsys.readouterr().err
    assert file.read_text() == MINI.read_text()


def test_a_study_with_replicates_is_not_replicated_again() -> None:
    with pytest.raises(ValueError, match="has replicates already"):
        replicated(replicated(small(), [1, 2], 1), [1, 2], 1)


def test_nothing_of_the_given_study_is_changed() -> None:
    before = small()
    replicated(before, [1, 2], 2)
    assert before == small()


def test_a_section_that_a_kind_adds_is_refused() -> None:
    study = {**small(), "reports": {"one": {"models": ["trained/sft"]}}}
    with pytest.raises(ValueError, match=r"sections that kinds of artifacts add cannot be replicated: reports; remove"):
        replicated(study, [1, 2], 1)
