"""Checks against what is on disk: hand-written manifests of data sets and tokenizers."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.study.addresses import output_of
from llmfusion.study.errors import StudyError
from llmfusion.study.graph import build_graph
from llmfusion.study.schema.study import Study
from llmfusion.study.staged import check_staged
from tests.unit.mini_study import small


def study(folder: Path) -> Study:
    data: dict[str, Any] = small() | {"directory": str(folder)}
    data["datasets"]["own"] = {"kind": "path", "path": "a.jsonl", "layout": "text", "license": "mit", "domain": "x"}
    data["mixes"]["raw"]["datasets"]["own"] = 100
    for name in ("left", "right"):
        data["models"]["base"][name] = {"kind": "path", "path": name, "vocabulary": "same", "license": "mit"}
    return Study.model_validate(data)


def stage(folder: Path, address: str, facts: dict, fingerprint: str | None = None) -> None:
    path = folder / output_of(address)
    path.parent.mkdir(parents=True)
    right = build_graph(study(folder)).artifacts[address].fingerprint
    path.write_text(json.dumps({"fingerprint": fingerprint or right, "facts": facts}))


def check(folder: Path) -> None:
    check_staged("s.yaml", study(folder), build_graph(study(folder)))


def test_nothing_staged_is_nothing_to_say(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(("rows", "refused"), [(99, True), (100, False), (5000, False)])
def test_a_staged_dataset_must_have_the_rows_a_mix_asks_for(tmp_path: Path, rows: int, refused: bool) -> None:
    stage(tmp_path, "data/dataset/own", {"samples": rows})
    if not refused:
        return check(tmp_path)
    with pytest.raises(StudyError, match=r"mixes\.raw\.datasets\.own: asks for 100 samples; the dataset staged has 99"):
        check(tmp_path)
    return None


def test_a_dataset_staged_for_another_spec_is_not_counted(tmp_path: Path) -> None:
    stage(tmp_path, "data/dataset/own", {"samples": 1}, fingerprint="0" * 64)
    check(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 50])
def test_a_damaged_manifest_is_left_to_its_readers(tmp_path: Path, content: str) -> None:
    path = tmp_path / output_of("data/dataset/own")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    check(tmp_path)


@pytest.mark.parametrize(("other", "refused"), [("aa", False), ("bb", True)])
def test_models_that_declare_one_vocabulary_must_have_one_tokenizer(tmp_path: Path, other: str, refused: bool) -> None:
    sizes = {"parameters": 135_000_000, "tokenizer_size": 49_152}
    stage(tmp_path, "models/base/left", {"vocabulary_sha256": "aa"})
    stage(tmp_path, "models/base/right", {"vocabulary_sha256": other, **sizes})
    if not refused:
        return check(tmp_path)
    with pytest.raises(StudyError) as caught:
        check(tmp_path)
    assert "base/right and base/left both say vocabulary 'same'" in str(caught.value)
    assert "differ: base/right (135M parameters, 49,152 tokens) and base/left; give" in str(caught.value)
    return None


def test_a_mistake_that_is_staged_is_told_with_its_line(tmp_path: Path) -> None:
    stage(tmp_path, "models/base/left", {"vocabulary_sha256": "aa"})
    stage(tmp_path, "models/base/right", {"vocabulary_sha256": "bb"})
    file = tmp_path / "s.yaml"
    file.write_text("models:\n  base:\n    left: {vocabulary: same}\n    right:\n      vocabulary: same\n")
    with pytest.raises(StudyError, match=r"s\.yaml:5: models\.base\.right\.vocabulary: base/right and base/left"):
        check_staged(file, study(tmp_path), build_graph(study(tmp_path)))


def orphan(folder: Path, address: str, spec: str) -> Path:
    path = folder / output_of(address)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"spec": spec, "fingerprint": "x", "facts": {}}))
    return path


def test_an_artifact_of_other_settings_that_snakemake_has_no_record_of_is_refused(tmp_path: Path) -> None:
    address = "models/trained/sft"
    orphan(tmp_path, address, '{"step":"train","recipe":0}')
    with pytest.raises(
        StudyError,
        match=r"models/trained/sft lies in .* with other settings .* remove results/models/trained/sft/manifest.json",
    ):
        check(tmp_path)
    record = tmp_path / ".snakemake/metadata" / base64.b64encode(output_of(address).encode()).decode()
    record.parent.mkdir(parents=True)
    record.touch()
    check(tmp_path)  # recorded: Snakemake sees the change itself and makes it again
    mark = tmp_path / ".snakemake/incomplete" / record.name
    mark.parent.mkdir()
    mark.touch()
    with pytest.raises(StudyError, match="with other settings"):
        check(tmp_path)  # recorded, but by a run before the killed one


def test_an_orphan_of_the_same_settings_is_kept(tmp_path: Path) -> None:
    address = "models/trained/sft"
    orphan(tmp_path, address, build_graph(study(tmp_path)).artifacts[address].spec)
    check(tmp_path)


def test_mistakes_that_staged_files_show_have_their_lines_and_come_all_at_once(tmp_path: Path) -> None:
    """The file as a user wrote it, one key a line."""
    import yaml

    data = study(tmp_path).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    stage(tmp_path, "models/base/left", {"vocabulary_sha256": "aa"})
    stage(tmp_path, "models/base/right", {"vocabulary_sha256": "bb"})
    stage(tmp_path, "data/dataset/own", {"samples": 99})
    orphan(tmp_path, "models/trained/sft", '{"step":"train","recipe":0}')
    with pytest.raises(StudyError) as caught:
        check_staged(file, study(tmp_path), build_graph(study(tmp_path)))
    first, *rows = str(caught.value).splitlines()
    assert first.endswith("study.yaml: 3 mistakes; nothing was started")
    lines = file.read_text().splitlines()
    shown = {}
    for row in rows:
        place, _, text = row.strip().partition(": ")
        shown[text.partition(": ")[0]] = lines[int(place.rpartition(":")[2]) - 1].strip()
    assert shown == {
        "mixes.raw.datasets.own": "own: 100",
        "models.base.right.vocabulary": "vocabulary: same",
        "models.trained.sft": "sft:",
    }
