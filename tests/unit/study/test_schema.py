"""Sections on their own: strict types, defaults, aliases; and the published schema."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from llmfusion import ROOT
from llmfusion.study import strict_yaml
from llmfusion.study.schema.merging import Merge
from llmfusion.study.schema.study import Study
from tests.unit.mini_study import refusal, small, small_study

SCHEMA: dict[str, Any] = json.loads((ROOT / "config/schema.json").read_text())
STUDIES = sorted((ROOT / "config").glob("*.yaml"))


def test_the_schema_file_is_what_the_models_say() -> None:
    assert Study.model_json_schema() == SCHEMA, "run: llmfusion schema > config/schema.json"


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.name)
def test_the_schema_accepts_every_study(file: Any) -> None:
    data, _ = strict_yaml.load(file)
    data = {key: value for key, value in data.items() if not key.startswith("x-")}
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA)


@pytest.mark.parametrize(
    ("section", "change"),
    [("datasets", {"x": {"kind": "hub"}}), ("batches", {"a": "mmlu"}), ("unknown", 1), ("scale", "huge")],
)
def test_the_schema_refuses_what_the_models_refuse(section: str, change: Any) -> None:
    data = {**small(), section: change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    with pytest.raises(ValidationError):
        Study.model_validate(data)


def _keys(node: Any, at: str = "") -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        for name, key in node.get("properties", {}).items():
            yield f"{at}.{name}", key
        for part, inner in node.items():
            yield from _keys(inner, f"{at}/{part}")
    elif isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _keys(inner, f"{at}/{i}")


def test_every_key_of_the_schema_is_described() -> None:
    keys = dict(_keys(SCHEMA))
    assert len(keys) > 100
    assert [place for place, key in keys.items() if len(key.get("description", "")) < 5] == []


def test_lambda_is_read_under_its_name_in_the_papers() -> None:
    merge = TypeAdapter(Merge).validate_python(
        {"method": "ta", "pivot": "base/p", "parents": ["trained/a"], "lambda": 0.3}
    )
    assert merge.scale == 0.3
    assert merge.model_dump(by_alias=True)["lambda"] == 0.3


def test_a_whole_number_is_a_share_but_true_and_text_are_not() -> None:
    merge = {"method": "rsaf", "pivot": "base/p", "parents": ["trained/a"]}
    assert TypeAdapter(Merge).validate_python({**merge, "tau": 1}).tau == 1.0
    for given in (True, "0.1", None, float("inf")):
        with pytest.raises(ValidationError):
            TypeAdapter(Merge).validate_python({**merge, "tau": given})


def test_a_study_cannot_be_changed_after_it_is_read() -> None:
    study = small_study()
    with pytest.raises(ValidationError):
        study.title = "another"  # type: ignore[misc]


@pytest.mark.parametrize("micro", [3, 32])
def test_micro_batches_must_divide_the_batch(micro: int) -> None:
    with pytest.raises(ValidationError, match=f"no multiple of micro_batch_size {micro}"):
        small_study(lambda d: d["models"]["trained"]["sft"].update(micro_batch_size=micro))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sharding": "full"}, "sharding: full splits the model over processes; give processes: 2 or more"),
        ({"micro_batch_size": 1, "micro_batch_tokens": 100}, "give micro_batch_size or micro_batch_tokens, not both"),
        (
            {"schedule": "constant", "lr_min": 1e-5},
            "lr_min 1e-05 is never reached with schedule: constant; leave it out",
        ),
    ],
)
def test_keys_of_a_training_that_contradict_each_other_are_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        small_study(lambda d: d["models"]["trained"]["sft"].update(changed))


def test_a_vocabulary_cannot_be_smaller_than_the_bytes() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 260"):
        small_study(lambda d: d["models"]["base"]["pivot"]["tokenizer"].update(vocabulary_size=259))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data.update(chat_template="netural"), "expected neutral, or a Jinja template"),
        (lambda data: data.update(chat_template="{{ broken"), "is no Jinja template"),
        (lambda data: data["tasks"]["mmlu"].update(prompt="{{ qestion }}"), "reads qestion; items have: question"),
        (
            lambda data: data["tasks"]["mmlu"].update(prompt="{{ a\n  b }}"),
            "is no Jinja template: line 2: expected token",
        ),
        (lambda data: data["tasks"]["mmlu"].update(prompt="{{ 'a' * 10**10 }}"), "is no safe Jinja template: line 1"),
        (lambda data: data["tasks"]["mmlu"].update(prompt="{{ ''.__class__ }}"), "is no safe Jinja template: line 1"),
        (lambda data: data["tasks"]["mmlu"].update(prompt="{% include 'x' %}"), "line 1: the tag 'include'"),
        (lambda data: data.update(chat_template="{{ messages.__class__ }}"), "is no safe Jinja template: line 1"),
        (lambda data: data["tasks"]["mmlu"].update(prompt="{% for %}"), "is no Jinja template"),
    ],
)
def test_templates_are_checked(change: Callable, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        small_study(change)


def test_a_template_of_ones_own_is_accepted() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert small_study(lambda data: data.update(chat_template=template)).chat_template == template


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"processes": 3}, "batch_size 16 is no multiple of processes 3, which share it"),
        ({"processes": 2, "micro_batch_size": 16}, "batch_size 16 / 2 processes is no multiple of micro_batch_size 16"),
        ({"processes": 0}, "greater than or equal to 1"),
    ],
)
def test_processes_share_the_batch_evenly(given: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        small_study(lambda d: d["models"]["trained"]["sft"].update(given))
    small_study(lambda d: d["models"]["trained"]["sft"].update(processes=2, micro_batch_size=4))


@pytest.mark.parametrize(
    ("section", "name"), [("tasks", "results"), ("datasets", "results"), ("tables", "results"), ("batches", "results")]
)
def test_nothing_may_be_named_like_the_folder_of_all_results(section: str, name: str, tmp_path: Path) -> None:
    data = small()
    data[section][name] = next(iter(data[section].values()))
    message = refusal(tmp_path, json.dumps(data))
    assert f": {section}.results: 'results' is the name of the folder of all results; take another" in message


def test_no_model_may_be_named_so_either(tmp_path: Path) -> None:
    data = small()
    data["models"]["trained"]["results"] = data["models"]["trained"]["sft"]
    message = refusal(tmp_path, json.dumps(data))
    assert ": models.trained.results: 'results' is the name of the folder of all results" in message
    assert message.startswith(f"{tmp_path}/study.yaml: 1 mistake;")


def test_a_name_that_is_too_long_says_so(tmp_path: Path) -> None:
    data = small()
    data["mixes"]["m" * 81] = data["mixes"]["raw"]
    assert "a name has at most 80 characters" in refusal(tmp_path, json.dumps(data))
