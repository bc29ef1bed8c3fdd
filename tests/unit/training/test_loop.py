import json
import logging
import math
import os
import signal
import time
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmfusion.artifacts.resume import note_path, write_note
from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.fusion.teacher import CachedTeacher
from llmfusion.io.files import sha256_file
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model
from llmfusion.training import loop as module
from llmfusion.training.loop import Student, train
from llmfusion.training.save_deadline import TimeLimit
from tests.unit.training.options import run_of

OPTIONS = {"steps": 12, "batch_size": 4, "lr": 1e-2, "lr_min": 1e-3, "warmup": 0.1, "seed": 3}
FUSED = {
    **OPTIONS,
    "teachers": ["base/one", "base/two"],
    "fusion": {"target": "udf", "lambda": 0.5, "temperature": 1.5},
}
Trained = namedtuple("Trained", "result weights")


@pytest.fixture
def teachers(cache, tied_cache, tokenizer):
    return [CachedTeacher(name, c, tokenizer, 300, "cpu") for name, c in (("one", cache), ("two", tied_cache))]


@pytest.fixture
def start(tmp_path, pivot, tokenizer, mix, teachers):
    """Trains from the pivot, with resume states in a folder of this name; returns the result and the weights."""

    def go(name, fused=True, spoil=lambda model: None, minutes=None, key="f", unchecked=(), **changed):
        model = load_model(pivot, "float32")
        spoil(model)
        run = run_of(**{**(FUSED if fused else OPTIONS), **changed}).model_copy(update=dict(unchecked))
        limit = None if minutes is None else TimeLimit(minutes, time.monotonic())
        state = tmp_path / name / "state"
        student = Student(model, tokenizer)
        result = train(student, run, run.fusion, [mix], teachers if fused else [], state, key, limit)
        return Trained(result, {name: t.clone() for name, t in model.state_dict().items()})

    return go


@pytest.fixture
def stopped_after_five(start, monkeypatch):
    """Sends SIGTERM in the fifth step of a training, which must save and exit; returns a function that resumes it."""
    step = module._Loop._step

    def interrupted(self, number, indices):
        step(self, number, indices)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", interrupted)
        with pytest.raises(SystemExit) as exit_:
            start("stopped")
    assert exit_.value.code == 143

    def forbid_old_steps(self, number, indices):
        assert number >= 5
        step(self, number, indices)

    monkeypatch.setattr(module._Loop, "_step", forbid_old_steps)
    return lambda **changed: start("stopped", **changed)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_was_stopped_and_goes_on_is_bit_for_bit_the_undisturbed_one(
    start, stopped_after_five, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    resumed = stopped_after_five()
    assert "going on after step 5 of 12" in caplog.messages
    monkeypatch.undo()
    whole = start("whole")
    assert equal(resumed.weights, whole.weights)
    assert resumed.result.records == whole.result.records
    assert resumed.result.facts == whole.result.facts


def test_without_the_optimizers_state_it_would_differ(start, stopped_after_five, tmp_path, monkeypatch):
    [state] = (tmp_path / "stopped" / "state").glob("*.safetensors")
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
    weights = {name: t for name, t in load_file(state).items() if not name.startswith("exp_avg")}
    save_file(weights, state, metadata=metadata)
    note = json.loads(note_path(state).read_bytes())
    write_note(state, {"key": note["key"], "sha256": sha256_file(state)})
    resumed = stopped_after_five()
    monkeypatch.undo()
    assert not equal(resumed.weights, start("whole").weights)


def test_a_state_of_another_spec_is_not_gone_on_from(stopped_after_five):
    with pytest.raises(AssertionError):  # it begins at step 0
        stopped_after_five(key="another")


def test_the_end_of_a_jobs_time_saves_after_the_step_in_hand(start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit) as exit_:
        start("short", minutes=0.0)
    assert exit_.value.code == 143
    state = tmp_path / "short" / "state"
    assert [p.name for p in state.glob("*.safetensors")] == ["step-00000001.safetensors"]
    assert caplog.messages[-1] == f"stopped after step 1 of 12; the state is saved in {state}"


def test_a_finished_training_has_changed_every_tensor_and_reports_its_facts(start, pivot, mix, tokenizer, samples):
    result, weights = start("job")
    before = load_model(pivot, "float32").state_dict()
    assert not [name for name in before if torch.equal(before[name], weights[name])]
    labels = sum(len(encode(s, tokenizer, 128).label_ids) for s in samples)
    records = result.records
    assert result.facts == {
        "steps": 12,
        "samples": len(samples),
        "rejected": {},
        "label_tokens": labels,
        "loss": records[-1]["loss"],
    }
    assert [r["step"] for r in records] == [1, 11, 12]
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * i / 11)) / 2 for i in (9, 10)]
    assert [r["lr"] for r in records] == pytest.approx([1e-2, *cosine])
    assert records[-1]["loss"] < records[0]["loss"]
    assert sum(records[0]["weight"].values()) == pytest.approx(1)
    assert records[0]["usable"] == {"one": 1.0, "two": 1.0}


def first_batch(mix, tokenizer):
    from llmfusion.training.corpus import Corpus

    corpus = Corpus([mix], tokenizer)
    [(_, indices)] = corpus.batches(run_of(**OPTIONS), 0, 1)
    samples = [corpus.samples[i] for i in indices]
    return [sample.sample["id"] for sample in samples], [sample.encoded for sample in samples]


def test_the_loss_is_the_mean_over_the_label_tokens_of_the_whole_batch(
    start, pivot, teacher, tied_teacher, mix, tokenizer
):
    [record] = start("job", steps=1).result.records
    models = [load_model(m, "float32") for m in (pivot, teacher, tied_teacher)]
    sft = fusion = tokens = 0.0
    for encoded in first_batch(mix, tokenizer)[1]:
        rows = label_positions(encoded)
        with torch.no_grad():
            z = [m(torch.tensor([encoded.ids])).logits[0, rows].double() for m in models]
        for t, y in enumerate(encoded.label_ids):
            plain, soft = ([(x[t] / T).log_softmax(-1) for x in z] for T in (1.0, 1.5))
            sft -= float(plain[0][y])
            scores = [1 / float(-(q.exp() * q).sum() - q[y] + 1e-6) for q in plain[1:]]
            fusion += sum(
                s / sum(scores) * float((q.exp() * (q - soft[0])).sum()) for s, q in zip(scores, soft[1:], strict=True)
            )
            tokens += 1
    assert record["sft"] == pytest.approx(sft / tokens, abs=1e-5)
    assert record["fusion"] == pytest.approx(fusion / tokens, abs=1e-5)
    assert record["loss"] == pytest.approx((0.5 * sft + 0.5 * fusion) / tokens, abs=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_and_with_them_padding_do_not_change_loss_and_gradient(start, size):
    [whole] = start("whole", steps=1).result.records
    # the schema asks for a divisor of the batch's size; the loop does not need one
    [split] = start("split", steps=1, unchecked={"micro_batch_size": size}).result.records
    for name in ("loss", "sft", "fusion", "grad_norm"):
        assert split[name] == pytest.approx(whole[name], rel=1e-6)
    assert split["weight"] == pytest.approx(whole["weight"], rel=1e-6)


@pytest.mark.parametrize("tokens", [60, 150])
def test_sorted_micro_batches_have_the_same_loss_and_gradient_and_less_padding(start, tokens):
    whole = start("whole", steps=1, batch_size=16).result
    split = start("split", steps=1, batch_size=16, micro_batch_tokens=tokens).result
    for name in ("loss", "sft", "fusion", "grad_norm"):
        assert split.records[0][name] == pytest.approx(whole.records[0][name], rel=1e-6)
    assert split.records[0]["weight"] == pytest.approx(whole.records[0]["weight"], rel=1e-6)
    assert split.measured["timings"][0]["padding"] < whole.measured["timings"][0]["padding"] / 2


def test_recomputed_activations_change_no_bit_not_even_with_dropout(start):
    def dropout(model):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1

    kept = start("kept", spoil=dropout)
    computed = start("computed", spoil=dropout, activation_checkpointing=True)
    assert equal(kept.weights, computed.weights)
    assert kept.result.records == computed.result.records
    assert not equal(kept.weights, start("plain").weights)


def test_recomputed_activations_are_not_kept(start, monkeypatch):
    """How often the layers run: once forward, and once more for the gradient."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    start("kept", steps=1)
    once = len(calls)
    start("computed", steps=1, activation_checkpointing=True)
    assert len(calls) - once == 2 * once


def test_bfloat16_weights_train_at_a_rate_that_moves_them_and_are_refused_at_another(start):
    result, weights = start("low", lr=1e-2, parameters="bfloat16")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert result.records[-1]["loss"] < result.records[0]["loss"]
    with pytest.raises(UserError, match="parameters: bfloat16 at lr 1e-06"):
        start("refused", lr=1e-6, lr_min=0.0, parameters="bfloat16")


def test_times_go_to_the_provenance_and_not_into_the_metrics(start):
    result = start("job").result
    timings = result.measured["timings"]
    assert [t["step"] for t in timings] == [r["step"] for r in result.records]
    assert all(t["tokens_per_second"] > 0 and t["seconds"] > 0 for t in timings)
    assert not {"seconds", "tokens_per_second", "mfu", "padding"} & set(result.records[0])


def test_without_teachers_it_is_sft_alone(start):
    [record] = start("job", fused=False, steps=1).result.records
    assert record["loss"] == pytest.approx(record["sft"])
    assert "fusion" not in record


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_lower_precision_stays_near_the_full_one(start, precision):
    [full] = start("full", steps=1).result.records
    [low] = start("low", steps=1, precision=precision).result.records
    assert low["loss"] != full["loss"]
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_a_loss_that_is_not_a_number_stops_with_step_samples_and_rate(start, mix, tokenizer):
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as error:
        start("nan", spoil=lambda model: model.model.norm.weight.data.fill_(torch.nan))
    message = str(error.value)
    assert message.startswith("step 1 of 12: ")
    assert "nan" in message
    assert "learning rate 0.01" in message
    assert all(name in message for name in ids)


def no_gradient(value):
    return lambda model: model.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, value))


def no_logit_of_any_label(model):
    """Every label is impossible: a loss of plus infinity, not NaN."""
    weight = model.lm_head.weight.data
    weight[:, 0] = 0
    weight[40:, 0] = -torch.inf
    weight[:40, 1:] = 0
    model.model.norm.register_forward_hook(
        lambda module, given, out: torch.cat([torch.ones_like(out[..., :1]), out[..., 1:]], -1)
    )


@pytest.mark.parametrize(
    ("spoil", "value"),
    [(no_gradient(torch.nan), "nan"), (no_gradient(torch.inf), "inf"), (no_logit_of_any_label, "inf")],
    ids=["gradient not a number", "infinite gradient", "infinite loss"],
)
def test_a_gradient_or_loss_that_is_not_finite_stops_the_same_way(start, mix, tokenizer, spoil, value):
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as error:
        start("wrong", fused=False, spoil=spoil)
    message = str(error.value)
    assert message.startswith(f"step 1 of 12: loss or gradient is {value} at learning rate 0.01; samples ")
    assert all(name in message for name in ids)


@pytest.mark.parametrize("name", ["hidden", "entropy"])
def test_a_teacher_that_turns_out_not_finite_stops_the_same_way(start, mix, tokenizer, monkeypatch, name):
    batch = CachedTeacher.distribution

    def spoilt(self, samples, labels):
        rows = batch(self, samples, labels)
        getattr(rows, name)[0] = torch.nan
        return rows

    monkeypatch.setattr(CachedTeacher, "distribution", spoilt)
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as error:
        start("wrong")
    assert str(error.value).startswith("step 1 of 12: loss or gradient is nan at learning rate 0.01; samples ")
    assert all(sample in str(error.value) for sample in ids)
