import json

import pytest
import torch

from llmfusion.data.samples import write_jsonl
from llmfusion.errors import UserError
from llmfusion.models.loading import load_model
from llmfusion.teachers.capture import capture
from llmfusion.train import build
from tests.unit.stand_ins import artifact, job

RUN = {"init": "base/pivot", "mix": "m", "batch_size": 4, "lr": 1e-3, "save_dtype": "float32"}


def fused(target, *teachers, **changed):
    """The spec of a training whose caches are what the stand-ins say."""
    captured = {"capture": {"dtype": "float32"}, "teachers": dict.fromkeys(teachers, "f" * 64)}
    return {"run": {**RUN, "teachers": list(teachers), "fusion": {"target": target}, **changed}, "captured": captured}


@pytest.fixture
def inputs(pivot, mix, cache, tied_cache):
    return {"models/base/pivot": pivot, "data/mix/m": mix, "teachers/base/one/m": cache, "teachers/base/two/m": tied_cache}


def test_a_fused_model_is_a_complete_checkpoint(tmp_path, inputs, pivot):
    made = job(tmp_path, fused("mince", "base/one", "base/two", steps=2), inputs)
    build(made)
    model = load_model(artifact(made.folder), "float32")
    before = load_model(pivot, "float32")
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert made.facts["steps"] == 2
    assert {key: made.facts[key] for key in ("architecture", "vocabulary_sha256", "parameters")} == {
        key: pivot.facts[key] for key in ("architecture", "vocabulary_sha256", "parameters")
    }
    assert (made.folder / "metrics.jsonl").exists()
    assert "Assistant" in (made.folder / "chat_template.jinja").read_text()


def test_an_online_teacher_is_taken_from_the_inputs_and_a_cache_of_another_teacher_is_refused(tmp_path, inputs, teacher, mix):
    folder = tmp_path / "online"
    folder.mkdir()
    settings = {"kind": "online", "dtype": "float32"}
    facts = capture(teacher, mix, folder, settings, None)
    online = artifact(folder, **facts)
    online.manifest["spec"] = json.dumps({"capture": settings})
    spec = fused("kd", "base/one", steps=3)
    told = job(tmp_path, spec, inputs, "cached")
    build(told)
    asked = {**spec, "captured": {**spec["captured"], "capture": settings}}
    made = job(tmp_path, asked, {**inputs, "teachers/base/one/m": online, "models/base/one": teacher}, "online")
    build(made)
    assert made.facts["loss"] == pytest.approx(told.facts["loss"], rel=1e-4)
    with pytest.raises(UserError, match=r"the teacher is not among this training's inputs"):
        build(job(tmp_path, asked, {**inputs, "teachers/base/one/m": online}, "alone"))
    with pytest.raises(UserError, match=r"teacher base/one: .* kind: captured with online, this training asks for hidden"):
        build(job(tmp_path, spec, {**inputs, "teachers/base/one/m": online}, "other"))


def test_generated_answers_double_the_steps_of_the_same_epochs(tmp_path, inputs, samples):
    folder = tmp_path / "generated"
    folder.mkdir()
    write_jsonl(folder / "samples.jsonl", [{**s, "id": f"g{s['id']}"} for s in samples])
    inputs = {**inputs, "data/generated/base/one/m": artifact(folder, max_length=128)}
    one, two = (
        job(tmp_path, {"run": {**RUN, "epochs": 1}}, inputs, "sft"),
        job(tmp_path, {"run": {**RUN, "epochs": 1, "generated": ["base/one"]}}, inputs, "seqkd"),
    )
    build(one)
    build(two)
    assert (one.facts["steps"], two.facts["steps"]) == (29 // 4, 58 // 4)
    assert two.facts["label_tokens"] == 2 * one.facts["label_tokens"]


def test_an_unknown_target_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="there is no fusion target 'magic'; there are: kd, naive, mince, udf, minilogit"):
        build(job(tmp_path, {"run": {**RUN, "steps": 2, "fusion": {"target": "magic"}}}))


def test_a_model_trained_from_a_trained_one_has_its_licences(tmp_path, inputs, pivot):
    """The chain of the paper's abstract: fuse one source, then the next into what came out."""
    staged = artifact(pivot.folder, **{**pivot.facts, "license": "llama3.1"})
    first = job(tmp_path, fused("kd", "base/one", steps=1), {**inputs, "models/base/pivot": staged}, "first")
    build(first)
    assert first.facts["license"] == ["llama3.1"]
    chain = fused("kd", "base/two", init="trained/first", steps=1)
    second = job(tmp_path, chain, {**inputs, "models/trained/first": artifact(first.folder, **first.facts)}, "second")
    build(second)
    assert second.facts["license"] == ["llama3.1"]
    assert second.facts["steps"] == 1
