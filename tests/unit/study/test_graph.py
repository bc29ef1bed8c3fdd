"""The graph of a study: who needs whom, what a change re-makes, and what a spec leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.io.digests import canonical
from llmfusion.study.addresses import output_of
from llmfusion.study.graph import PlannedArtifact, build_graph
from llmfusion.study.kinds import gpus_of
from llmfusion.study.load import read_study
from llmfusion.study.schema.base_models import PathModel, model_files
from tests.unit.mini_study import small_study


def prints(change: Any = lambda data: None) -> dict[str, str]:
    return {a: entry.fingerprint for a, entry in build_graph(small_study(change)).artifacts.items()}


def changed(change: Any) -> set[str]:
    before, after = prints(), prints(change)
    return {a for a in before.keys() | after.keys() if before.get(a) != after.get(a)}


def needing(artifacts: dict[str, PlannedArtifact], seeds: set[str]) -> set[str]:
    """Independent closure over declared inputs: the seeds and everything that needs them."""
    made = {output_of(a): a for a in artifacts}
    out = set(seeds)
    while True:
        more = {a for a, entry in artifacts.items() if any(made.get(i) in out for i in entry.inputs)} - out
        if not more:
            return out
        out |= more


def test_every_input_is_made_by_the_plan_or_lies_outside_the_results() -> None:
    artifacts = build_graph(small_study()).artifacts
    made = {output_of(a) for a in artifacts}
    assert len(made) == len(artifacts)
    assert {i for entry in artifacts.values() for i in entry.inputs} <= made


@pytest.mark.parametrize(
    ("name", "model", "direct"),
    [
        ("sft", "trained/sft", {"models/base/pivot", "data/mix/student"}),
        ("kd", "trained/kd-code", {"models/base/pivot", "data/mix/student", "teachers/base/code/student"}),
        ("seqkd", "trained/seqkd-code", {"models/base/pivot", "data/mix/student", "data/generated/base/code/student"}),
        ("merge", "merged/ta-homogeneous", {"models/base/pivot", "models/trained/kd-code", "models/trained/kd-math"}),
    ],
)
def test_a_model_needs_what_it_is_made_from(name: str, model: str, direct: set[str]) -> None:
    assert set(build_graph(small_study()).artifacts[f"models/{model}"].inputs) == {output_of(a) for a in direct}


@pytest.mark.parametrize(
    ("seed", "change"),
    [
        ("models/trained/kd-code", lambda d: d["models"]["trained"]["kd-code"].update(lr=0.001, lr_min=0.0)),
        ("models/merged/ta-homogeneous", lambda d: d["models"]["merged"]["ta-homogeneous"].update({"lambda": 0.5})),
        ("data/dataset/noisy-code", lambda d: d["datasets"]["noisy-code"].update(seed=8)),
        ("data/mix/student", lambda d: d["mixes"]["student"].update(seed=1)),
        ("models/base/code", lambda d: d["models"]["base"]["code"].update(seed=1)),
    ],
)
def test_a_change_reaches_exactly_what_needs_it(seed: str, change: Any) -> None:
    assert changed(change) == needing(build_graph(small_study()).artifacts, {seed})


def test_how_models_are_asked_changes_answers_but_no_model() -> None:
    touched = changed(lambda d: d["answering"].update(batch_size=1))
    assert {a.split("/")[0] for a in touched} == {"answers", "scores", "tables"}


def test_a_label_changes_the_table_alone() -> None:
    assert changed(lambda d: d["tasks"]["mmlu"].update(label="other")) == {"tables/table2"}


def test_a_limit_asks_again_and_makes_no_data_and_no_model_again() -> None:
    """A mix is compared with the tests: were the limit one of the staged items, every training would be repeated."""

    def limit(data: dict[str, Any]) -> None:
        data["tasks"]["mmlu"]["limit"] = 20

    assert {a.split("/")[0] for a in changed(limit)} == {"answers", "scores", "tables"}
    assert "scores/base/pivot/mmlu" in changed(limit)
    artifacts = build_graph(small_study(limit)).artifacts
    assert json.loads(artifacts["answers/base/pivot/all"].spec)["tasks"]["mmlu"]["limit"] == 20
    assert json.loads(artifacts["scores/base/pivot/mmlu"].spec)["limit"] == 20
    assert "limit" not in json.loads(artifacts["scores/base/pivot/math"].spec)
    labels = dict(json.loads(artifacts["tables/table2"].spec)["tasks"])
    assert labels["mmlu"] == "MMLU-like, 20 items"
    assert labels["math"] == "MATH-like"


def test_writing_out_a_default_changes_nothing() -> None:
    def spell(data: dict) -> None:
        data["models"]["trained"]["kd-code"].update(weight_decay=0.01, seed=42, optimizer="c_adamw")
        data["models"]["trained"]["kd-code"]["fusion"].update({"lambda": 0.5, "temperature": 1.0})
        data["mixes"]["raw"].update(decontaminate="report")
        data["chat_template"] = "neutral"

    assert changed(spell) == set()


def test_a_spec_leaves_defaults_out_so_that_a_new_option_re_makes_nothing() -> None:
    entry = build_graph(small_study(lambda d: d["mixes"]["raw"].update(seed=42, min_ascii=0.5))).artifacts[
        "data/mix/raw"
    ]
    assert json.loads(entry.spec)["mix"] == {"datasets": {"text-facts": 5}, "max_length": 128, "min_ascii": 0.5}


def test_the_order_of_keys_changes_nothing() -> None:
    def turn(data: dict) -> None:
        data["models"]["trained"] = {
            n: dict(reversed(run.items())) for n, run in reversed(data["models"]["trained"].items())
        }

    assert changed(turn) == set()


def test_specs_are_canonical_and_name_step_and_recipe() -> None:
    for entry in build_graph(small_study()).artifacts.values():
        spec = json.loads(entry.spec)
        assert canonical(spec) == entry.spec
        assert isinstance(spec["step"], str)
        assert isinstance(spec["recipe"], int)


def test_only_trainings_with_projectors_name_them_in_their_spec() -> None:
    """Those are made again, for their learning rate ends elsewhere than before; all others are what they were."""

    def other_vocabulary(data: dict) -> None:
        data["models"]["base"]["code"] = {"kind": "path", "path": "x", "vocabulary": "x", "license": "mit"}

    study = small_study(other_vocabulary)
    specs = {a: json.loads(entry.spec) for a, entry in build_graph(study).artifacts.items()}
    with_code = {f"models/trained/{name}" for name, run in study.models.trained.items() if "base/code" in run.teachers}
    assert with_code
    named = {a: spec["projected"] for a, spec in specs.items() if "projected" in spec}
    assert named == {address: ["base/code"] for address in with_code}
    assert not any("projected" in entry.spec for entry in build_graph(small_study()).artifacts.values())


def test_outside_files_are_inputs() -> None:
    def own(data: dict) -> None:
        data["datasets"]["own"] = {
            "kind": "path",
            "path": "d/a.jsonl",
            "layout": "text",
            "license": "mit",
            "domain": "x",
        }
        data["models"]["base"]["own"] = {"kind": "path", "path": "/m/own", "vocabulary": "own", "license": "mit"}

    artifacts = build_graph(small_study(own)).artifacts
    assert artifacts["data/dataset/own"].inputs == [str(ROOT / "d/a.jsonl")]
    assert artifacts["models/base/own"].inputs == ["/m/own/config.json"]


def sharded(count: int, **capture: Any) -> Any:
    return lambda data: data.update(capture={**data.get("capture", {}), "shards": count, **capture})


def test_the_number_of_shards_changes_no_artifact() -> None:
    made = build_graph(small_study()).artifacts
    for count in (2, 5):
        split = build_graph(small_study(sharded(count))).artifacts
        shards = {a for a in split if a.startswith("teachers/shards/")}
        assert {a.rsplit("/", 1)[1] for a in shards} == {f"{i}-of-{count}" for i in range(1, count + 1)}
        assert {a: (e.spec, e.fingerprint) for a, e in split.items() if a not in shards} == {
            a: (e.spec, e.fingerprint) for a, e in made.items()
        }
        for address in (a for a in made if a.startswith("teachers/")):
            mine = [
                output_of(s) for s in sorted(shards) if s.startswith(address.replace("teachers/", "teachers/shards/"))
            ]
            assert sorted(split[address].inputs) == sorted([*made[address].inputs, *mine])
            assert len(mine) == count
            assert all(split[s].inputs == made[address].inputs for s in shards if output_of(s) in mine)
            assert gpus_of(address, made[address].spec, len(made[address].shards)) == 1
            assert gpus_of(address, split[address].spec, len(split[address].shards)) == 0


def test_a_cache_that_is_there_keeps_the_shards_it_was_made_in(tmp_path: Path) -> None:
    def planned(count: int, **capture: Any) -> dict[str, PlannedArtifact]:
        def change(data: dict[str, Any]) -> None:
            data["directory"] = str(tmp_path)
            sharded(count, **capture)(data)

        return build_graph(small_study(change)).artifacts

    address = "teachers/base/code/student"
    output = tmp_path / output_of(address)
    output.parent.mkdir(parents=True)
    output.write_text(json.dumps({"fingerprint": planned(3)[address].fingerprint}))
    output.with_name("provenance.json").write_text(json.dumps({"shards": planned(3)[address].shards}))
    for count in (1, 3, 8):
        assert planned(count)[address] == planned(3)[address]
    assert len(planned(8, batch_size=99)[address].shards) == 8  # it is to be made again
    output.with_name("provenance.json").write_text(json.dumps({"shards": []}))
    assert planned(3)[address].shards == []
    output.with_name("provenance.json").unlink()
    assert len(planned(3)[address].shards) == 3


def test_a_training_with_online_teachers_needs_them_and_says_what_it_expects() -> None:
    made = build_graph(small_study(sharded(1, kind="online"))).artifacts
    assert "results/models/base/code/manifest.json" in made["models/trained/kd-code"].inputs
    assert (
        "results/models/base/code/manifest.json"
        not in build_graph(small_study()).artifacts["models/trained/kd-code"].inputs
    )
    told = json.loads(made["models/trained/kd-code"].spec)["captured"]
    assert told["teachers"] == {"base/code": made["models/base/code"].fingerprint}
    assert told["capture"]["kind"] == "online"
    assert "shards" not in told["capture"]
    assert "captured" not in json.loads(made["models/trained/sft"].spec)


def test_the_paper_study_plans_all_rows_of_table_2() -> None:
    study = read_study(ROOT / "config/config.yaml")
    artifacts = build_graph(study).artifacts
    assert len(study.tables["table2"].rows) == 38
    assert len(artifacts["tables/table2"].inputs) == 38 * 4


def test_every_file_of_a_models_folder_is_an_input_that_snakemake_watches(tmp_path: Path) -> None:
    for name in ("config.json", "model-1.safetensors", "tokenizer.json", "run.py", "old.bin"):
        (tmp_path / name).touch()
    found = build_graph(
        small_study(
            lambda data: data["models"]["base"].update(
                own={"kind": "path", "path": str(tmp_path), "vocabulary": "x", "license": "mit"}
            )
        )
    )
    assert found.artifacts["models/base/own"].inputs == [
        str(tmp_path / name) for name in ("config.json", "model-1.safetensors", "tokenizer.json")
    ]


@pytest.mark.parametrize("name", ["{output}.txt", "{base}.json", "a\nb.json"])
def test_a_file_of_a_model_that_snakemake_would_misread_is_left_to_the_job_that_stages_it(
    tmp_path: Path, name: str
) -> None:
    for file in ("config.json", "model.safetensors", name):
        (tmp_path / file).touch()
    entry = PathModel(kind="path", path=str(tmp_path), vocabulary="v", license="mit")
    assert model_files(entry) == [f"{tmp_path}/config.json"]
    (tmp_path / name).unlink()
    assert model_files(entry) == [f"{tmp_path}/config.json", f"{tmp_path}/model.safetensors"]
