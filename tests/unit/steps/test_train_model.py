import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from llmfusion.errors import UserError
from llmfusion.io.jsonl import write_jsonl
from llmfusion.models.loading import load_model, load_tokenizer, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.steps import train_model
from llmfusion.steps.train_model import build
from llmfusion.study.schema.base_models import Architecture, Tokenizer
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.capture import capture
from llmfusion.training import loop
from tests.unit.stand_ins import ARCHITECTURE, STAND_IN, artifact, job

RUN = {"init": "base/pivot", "mix": "m", "batch_size": 4, "lr": 1e-3, "save_dtype": "float32"}


def plain(**changed):
    """The spec of a training without teachers."""
    return {"run": {**RUN, **changed}}


def fused(target, *teachers, **changed):
    """The spec of a training whose caches are what the stand-ins hold."""
    captured = {"capture": {"dtype": "float32"}, "teachers": dict.fromkeys(teachers, "f" * 64)}
    return {"run": {**RUN, "teachers": list(teachers), "fusion": {"target": target}, **changed}, "captured": captured}


@pytest.fixture
def inputs(pivot, mix, cache, tied_cache):
    return {
        "models/base/pivot": pivot,
        "data/mix/m": mix,
        "teachers/base/one/m": cache,
        "teachers/base/two/m": tied_cache,
    }


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


def test_tokenizer_template_and_generation_settings_are_the_pivots(tmp_path, inputs, pivot):
    folder = tmp_path / "pivot"
    shutil.copytree(pivot.folder, folder)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [0, 7],\n "temperature": 0.6, "top_p": 0.9, "do_sample": true}'
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    staged = artifact(folder, **pivot.facts)
    spec = {**plain(steps=1), "chat_template": "neutral"}
    made = job(tmp_path, spec, {**inputs, "models/base/pivot": staged})
    build(made)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (made.folder / name).read_bytes() == (folder / name).read_bytes()
    before, after = load_tokenizer(folder, None), load_tokenizer(made.folder, None)
    text = "What is 3 plus 4?\n  7 é"
    assert after(text) == before(text)
    assert (after.get_vocab(), after.special_tokens_map, after.chat_template) == (
        before.get_vocab(),
        before.special_tokens_map,
        before.chat_template,
    )
    assert load_model(artifact(made.folder), "float32").generation_config.eos_token_id == [0, 7]


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "lm_head_multiplier"])
def test_a_pivot_that_changes_logits_behind_its_head_is_refused_by_name(tmp_path, inputs, pivot, name):
    folder = shutil.copytree(pivot.folder, tmp_path / "capped")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: 30.0}))
    with pytest.raises(UserError, match=rf"{name} is 30.0: it changes logits behind the head"):
        build(job(tmp_path, plain(steps=1), {**inputs, "models/base/pivot": artifact(folder, **pivot.facts)}))


CARD = """---
tags: [udf, llm-fusion-workflow]
---

# Trained model

Unified fusion, UDF, trained with llm-fusion-workflow after InfiFusion, arXiv 2501.02795v1 (https://arxiv.org/abs/2501.02795v1).

- pivot: base/pivot
- teacher: base/one
- teacher: base/two
- data: 29 samples of the mix m
- 2 steps of 4 samples at a peak learning rate of 0.001; last loss {loss:.4f} nats a token

Licences stated for what it was made from:
- apache-2.0: dataset/chat
- llama3.1: base/one, base/pivot

Options that are not the default:
- batch_size: 4
- fusion.lambda: 0.3
- fusion.target: udf
- lr: 0.001
- save_dtype: float32
- steps: 2
"""


def test_the_card_tells_what_was_trained_from_what(tmp_path, inputs, pivot):
    spec = fused("udf", "base/one", "base/two", steps=2, fusion={"target": "udf", "lambda": 0.3})
    licensed = {
        "models/base/pivot": "llama3.1",
        "teachers/base/one/m": {"models/base/one": "llama3.1", "data/dataset/chat": "apache-2.0"},
        "teachers/base/two/m": {"data/dataset/chat": "apache-2.0"},
        "data/mix/m": {"data/dataset/chat": "apache-2.0"},
    }
    staged = {
        name: replace(one, manifest={**one.manifest, "facts": {**one.facts, "license": licensed[name]}})
        for name, one in inputs.items()
    }
    cards = []
    for name in ("first", "second"):
        made = job(tmp_path, spec, staged, name)
        build(made)
        cards.append((made.folder / "README.md").read_text())
    assert cards[0].startswith(CARD.format(loss=made.facts["loss"]))
    assert cards[0] == cards[1]
    code = cards[0].split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(str(made.folder)))
    loaded: dict = {}
    exec(code, loaded)
    assert torch.equal(loaded["model"].lm_head.weight, load_model(artifact(made.folder), "float32").lm_head.weight)


def test_an_online_teacher_is_taken_from_the_inputs_and_a_cache_of_another_teacher_is_refused(
    tmp_path, inputs, teacher, mix
):
    folder = tmp_path / "online"
    folder.mkdir()
    settings = {"kind": "online", "dtype": "float32"}
    facts = capture(teacher, mix, folder, Capture.model_validate(settings), None)
    online = artifact(folder, **facts)
    online.manifest["spec"] = json.dumps({"capture": settings})
    spec = fused("kd", "base/one", steps=3)
    cached = job(tmp_path, spec, inputs, "cached")
    build(cached)
    online_spec = {**spec, "captured": {**spec["captured"], "capture": settings}}
    with_teacher = {**inputs, "teachers/base/one/m": online, "models/base/one": teacher}
    made = job(tmp_path, online_spec, with_teacher, "online")
    build(made)
    assert made.facts["loss"] == pytest.approx(cached.facts["loss"], rel=1e-4)
    with pytest.raises(UserError, match=r"the teacher is not among this training's inputs"):
        build(job(tmp_path, online_spec, {**inputs, "teachers/base/one/m": online}, "alone"))
    with pytest.raises(
        UserError, match=r"teacher base/one: .* kind: captured with online, this training asks for hidden"
    ):
        build(job(tmp_path, spec, {**inputs, "teachers/base/one/m": online}, "other"))


def test_a_teacher_that_is_projected_although_the_study_says_otherwise_is_refused(tmp_path, inputs, mix):
    """The study gave it the student's word under vocabulary, and its tokenizer is another one."""
    tokenizer = make_tokenizer(Tokenizer(vocabulary_size=280), mix.file("samples.jsonl"), None)
    folder = tmp_path / "foreign"
    facts = save_model(make_model(Architecture(**ARCHITECTURE), tokenizer, 5), tokenizer, folder, "float32")
    (tmp_path / "foreign-cache").mkdir()
    settings = Capture(dtype="float32")
    facts = capture(artifact(folder, **facts), mix, tmp_path / "foreign-cache", settings, None)
    inputs = {**inputs, "teachers/base/one/m": artifact(tmp_path / "foreign-cache", **facts)}
    with pytest.raises(UserError, match=r"base/one: its tokenizer differs from that of base/pivot, but the study"):
        build(job(tmp_path, fused("kd", "base/one", steps=1), inputs, "same"))
    declared = job(tmp_path, {**fused("kd", "base/one", steps=1), "projected": ["base/one"]}, inputs, "other")
    build(declared)
    assert declared.facts["steps"] == 1


def test_generated_answers_double_the_steps_of_the_same_epochs(tmp_path, inputs, samples):
    folder = tmp_path / "generated"
    folder.mkdir()
    write_jsonl(folder / "samples.jsonl", [{**s, "id": f"g{s['id']}"} for s in samples])
    inputs = {**inputs, "data/generated/base/one/m": artifact(folder, max_length=128)}
    sft = job(tmp_path, plain(epochs=1), inputs, "sft")
    seqkd = job(tmp_path, plain(epochs=1, generated=["base/one"]), inputs, "seqkd")
    build(sft)
    build(seqkd)
    assert sft.facts["steps"] == 29 // 4
    assert seqkd.facts["steps"] == 58 // 4
    assert seqkd.facts["label_tokens"] == 2 * sft.facts["label_tokens"]


def test_an_unknown_target_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="magic"):
        build(job(tmp_path, fused("magic", "base/one", steps=2)))


def test_a_model_trained_from_a_trained_one_has_its_licences(tmp_path, inputs, pivot):
    """The chain of the paper's abstract: fuse one source, then the next into what came out."""
    staged = artifact(pivot.folder, **{**pivot.facts, "license": "llama3.1"})
    first = job(tmp_path, fused("kd", "base/one", steps=1), {**inputs, "models/base/pivot": staged}, "first")
    build(first)
    assert first.facts["license"] == {"models/base/pivot": "llama3.1", **STAND_IN}
    chain = fused("kd", "base/two", init="trained/first", steps=1)
    second = job(tmp_path, chain, {**inputs, "models/trained/first": artifact(first.folder, **first.facts)}, "second")
    build(second)
    assert second.facts["license"] == first.facts["license"]
    assert second.facts["steps"] == 1


def test_metrics_and_times_are_those_of_the_training(tmp_path, inputs):
    made = job(tmp_path, fused("mince", "base/one", "base/two", steps=12), inputs)
    build(made)
    records = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 11, 12]
    assert records[-1]["loss"] == made.facts["loss"]
    assert [timing["step"] for timing in made.measured["training"]["timings"]] == [1, 11, 12]
    assert made.start_seconds is not None


def test_a_training_that_is_stopped_by_sigterm_and_goes_on_writes_the_bytes_of_an_undisturbed_one(
    tmp_path, inputs, monkeypatch
):
    spec = fused("mince", "base/one", "base/two", steps=12)
    step = loop._Loop._step

    def interrupted(self, number, indices):
        step(self, number, indices)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = job(tmp_path, spec, inputs, "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", interrupted)
        with pytest.raises(SystemExit) as exit_:
            build(stopped)
    assert exit_.value.code == 143
    assert not list(stopped.folder.iterdir())
    build(stopped)
    whole = job(tmp_path, spec, inputs, "whole")
    build(whole)
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in stopped.folder.iterdir())
    assert all((stopped.folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in names)
    assert stopped.facts == whole.facts


def test_the_minutes_of_a_job_become_the_time_limit_of_its_training(tmp_path, inputs):
    made = job(tmp_path, plain(steps=12), inputs, time_limit_minutes=0.0)
    with pytest.raises(SystemExit) as exit_:
        build(made)
    assert exit_.value.code == 143
    assert [path.name for path in (made.work / "state").glob("*.safetensors")] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_is_not_finite_leaves_nothing_in_the_folder(tmp_path, inputs, monkeypatch, value):
    run_training = train_model.run_training

    def spoilt(job, student, *more):
        student.model.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, value))
        run_training(job, student, *more)

    monkeypatch.setattr(train_model, "run_training", spoilt)
    made = job(tmp_path, plain(steps=2), inputs)
    with pytest.raises(UserError, match=rf"step 1 of 2: loss or gradient is {value}"):
        build(made)
    assert not list(made.folder.iterdir())
