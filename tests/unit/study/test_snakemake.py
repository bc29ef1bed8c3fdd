"""The study as the Snakefile sees it: stages, wildcard values, inputs, specs, and messages without a traceback."""

import json
from pathlib import Path

import pytest

from llmfusion import ROOT
from llmfusion.study.snakemake import addresses_of, checked, load_study
from tests.unit.mini_study import MINI, small, write


def test_the_snakefile_gets_stages_names_inputs_and_specs() -> None:
    loaded = load_study(MINI)
    study, expected = checked(MINI)
    assert loaded.directory == str(ROOT / study.directory)
    assert len(loaded.stages["scores"]) == len(study.tables["table2"].rows) * len(study.tables["table2"].tasks)
    assert loaded.names["base"] == "code|math|pivot"
    assert loaded.spec("models/{model}")({"model": "trained/sft"}) == expected.artifacts["models/trained/sft"].spec
    assert loaded.inputs("data/mix/{mix}")({"mix": "raw"}) == expected.artifacts["data/mix/raw"].inputs


def test_names_are_safe_in_a_regular_expression(tmp_path: Path) -> None:
    text = MINI.read_text().replace("gsm8k", "gsm.8k")
    assert "gsm\\.8k" in load_study(write(tmp_path, text)).names["task"]


@pytest.mark.parametrize(
    ("files", "options", "part"),
    [
        ((MINI, MINI), {}, "several --configfile"),
        ((), {}, "several --configfile"),
        ((MINI,), {"overrides": {"lr": 1}}, "--config lr"),
        ((MINI,), {"directory": "x"}, "set its key 'directory'"),
        (("absent.yaml",), {}, "cannot be read"),
    ],
)
def test_snakemake_gets_one_message_instead_of_a_traceback(files: tuple, options: dict, part: str) -> None:
    with pytest.raises(SystemExit) as caught:
        load_study(*files, **options)
    assert part in str(caught.value.code)


def test_a_wildcard_that_no_artifact_has_matches_nothing() -> None:
    assert load_study(MINI).names["shard"] == "(?!)"


def test_gpus_are_those_of_the_spec() -> None:
    loaded = load_study(MINI)
    assert loaded.gpus("models/{model}")({"model": "trained/sft"}) == 1
    assert loaded.gpus("scores/{model}/{task}")({"model": "trained/sft", "task": "mmlu"}) == 0


def test_a_study_without_teachers_has_an_empty_stage_for_them(tmp_path: Path) -> None:
    data = small()
    data["models"]["trained"] = {"sft": data["models"]["trained"]["sft"]}
    data["models"]["merged"] = {}
    data["tables"] = {"table2": {"tasks": ["mmlu"], "rows": [{"model": "trained/sft", "category": "c", "label": "l"}]}}
    loaded = load_study(write(tmp_path, json.dumps(data)))
    assert loaded.stages["teachers"] == []
    assert addresses_of(loaded.graph, ["teachers"]) == []
