import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.fusion.teacher import CachedTeacher
from llmfusion.io.files import sha256_file
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model
from llmfusion.training import loop as module
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import job

SPEC = {
    "steps": 12,
    "batch_size": 4,
    "lr": 1e-2,
    "lr_min": 1e-3,
    "warmup": 0.1,
    "seed": 3,
    "fusion": {"target": "udf", "lambda": 0.5, "temperature": 1.5},
}


@pytest.fixture
def teachers(cache, tied_cache, tokenizer):
    return [CachedTeacher(name, c, tokenizer, 300, "cpu") for name, c in (("one", cache), ("two", tied_cache))]


@pytest.fixture
def start(tmp_path, pivot, tokenizer, mix, teachers):
    """Trains from the pivot into a named job; returns the job, the facts, the weights and the records."""

    def go(name, teachers=teachers, spoil=lambda model: None, minutes=None, key="f", **changed):
        made = job(tmp_path, name=name, minutes=minutes, key=key)
        model = load_model(pivot, "float32")
        spoil(model)
        facts = train(made, Student(model, tokenizer), {**SPEC, **changed}, [mix], teachers)
        records = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
        return made, facts, {name: t.clone() for name, t in model.state_dict().items()}, records

    return go


@pytest.fixture
def stopped_after_five(start, monkeypatch):
    """Sends SIGTERM within the fifth step of a job, which must save and leave; returns a function that goes on with it."""
    step = module._Loop._step

    def interrupted(self, number, samples):
        step(self, number, samples)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", interrupted)
        with pytest.raises(SystemExit) as left:
            start("stopped")
    assert left.value.code == 143

    def forbid_old_steps(self, number, samples):
        assert number >= 5
        step(self, number, samples)

    monkeypatch.setattr(module._Loop, "_step", forbid_old_steps)
    return lambda **changed: start("stopped", **changed)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_was_stopped_and_goes_on_is_bit_for_bit_the_undisturbed_one(start, stopped_after_five, monkeypatch):
    went_on, facts, weights, _ = stopped_after_five()
    monkeypatch.undo()
    whole, whole_facts, whole_weights, _ = start("whole")
    assert equal(weights, whole_weights)
    assert (went_on.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert facts == whole_facts


def test_without_the_optimizers_state_it_would_differ(start, stopped_after_five, tmp_path, monkeypatch):
    [state] = (tmp_path / "stopped" / "work" / "state").glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        note = file.metadata()
    save_file({name: t for name, t in load_file(state).items() if not name.startswith("exp_avg")}, state, metadata=note)
    state.with_suffix(".sha256").write_text(sha256_file(state))
    _, _, weights, _ = stopped_after_five()
    monkeypatch.undo()
    assert not equal(weights, start("whole")[2])


def test_a_state_of_another_spec_is_not_gone_on_from(stopped_after_five):
    with pytest.raises(AssertionError):  # it begins at step 0
        stopped_after_five(key="another")


def test_the_end_of_a_jobs_time_saves_after_the_step_in_hand(start, tmp_path):
    with pytest.raises(SystemExit) as left:
        start("short", minutes=0.0)
    assert left.value.code == 143
    assert [p.name for p in (tmp_path / "short" / "work" / "state").glob("*.safetensors")] == [
        "step-00000001.safetensors"
    ]


def test_a_finished_training_has_changed_every_tensor_and_tells_its_facts(start, pivot, mix, tokenizer, samples):
    _, facts, weights, records = start("job")
    before = load_model(pivot, "float32").state_dict()
    assert not [name for name in before if torch.equal(before[name], weights[name])]
    labels = sum(len(encode(s, tokenizer, 128).label_ids) for s in samples)
    assert facts == {
        "steps": 12,
        "samples": len(samples),
        "rejected": {},
        "label_tokens": labels,
        "loss": records[-1]["loss"],
    }
    assert [r["step"] for r in records] == [1, 11, 12]
    assert [r["lr"] for r in records] == pytest.approx(
        [1e-2, *(1e-3 + 9e-3 * (1 + math.cos(math.pi * i / 11)) / 2 for i in (9, 10))]
    )
    assert records[-1]["loss"] < records[0]["loss"]
    assert sum(records[0]["weight"].values()) == pytest.approx(1)
    assert records[0]["usable"] == {"one": 1.0, "two": 1.0}


def first_batch(mix, tokenizer):
    from llmfusion.training.corpus import Corpus

    corpus = Corpus([mix], tokenizer)
    [(_, numbers)] = corpus.batches(SPEC, 0, 1)
    return [corpus.drawn[i].sample["id"] for i in numbers], [corpus.drawn[i].encoded for i in numbers]


def test_the_loss_is_the_mean_over_the_label_tokens_of_the_whole_batch(
    start, pivot, teacher, tied_teacher, mix, tokenizer
):
    record = start("job", steps=1)[3][0]
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
    whole, split = start("whole", steps=1)[3][0], start("split", steps=1, micro_batch_size=size)[3][0]
    for name in ("loss", "sft", "fusion", "grad_norm"):
        assert split[name] == pytest.approx(whole[name], rel=1e-6)
    assert split["weight"] == pytest.approx(whole["weight"], rel=1e-6)


@pytest.mark.parametrize("tokens", [60, 150])
def test_sorted_micro_batches_have_the_same_loss_and_gradient_and_less_padding(start, tokens):
    whole, split = (
        start("whole", steps=1, batch_size=16),
        start("split", steps=1, batch_size=16, micro_batch_tokens=tokens),
    )
    for name in ("loss", "sft", "fusion", "grad_norm"):
        assert split[3][0][name] == pytest.approx(whole[3][0][name], rel=1e-6)
    assert split[3][0]["weight"] == pytest.approx(whole[3][0]["weight"], rel=1e-6)
    assert padded(split[0]) < padded(whole[0]) / 2


def padded(job):
    return job.measured["training"]["timings"][0]["padding"]


def test_recomputed_activations_change_no_bit_not_even_with_dropout(start):
    def dropout(model):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1

    kept, computed, plain = (
        start("kept", spoil=dropout),
        start("computed", spoil=dropout, activation_checkpointing=True),
        start("plain"),
    )
    assert equal(kept[2], computed[2])
    assert (kept[0].folder / "metrics.jsonl").read_bytes() == (computed[0].folder / "metrics.jsonl").read_bytes()
    assert not equal(kept[2], plain[2])


def test_recomputed_activations_are_not_kept(start, monkeypatch):
    """How often the layers run: once forward, and once more for the gradient."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    start("kept", steps=1)
    once = len(calls)
    start("computed", steps=1, activation_checkpointing=True)
    assert len(calls) - once == 2 * once


def test_bfloat16_weights_train_at_a_rate_that_moves_them_and_are_refused_at_another(start):
    _, _, weights, records = start("low", lr=1e-2, parameters="bfloat16")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert records[-1]["loss"] < records[0]["loss"]
    with pytest.raises(UserError, match="parameters: bfloat16 at lr 1e-06"):
        start("refused", lr=1e-6, lr_min=0.0, parameters="bfloat16")


def test_times_go_to_the_provenance_and_not_into_the_metrics(start):
    made, _, _, records = start("job")
    timings = made.measured["training"]["timings"]
    assert [t["step"] for t in timings] == [r["step"] for r in records]
    assert all(t["tokens_per_second"] > 0 and t["seconds"] > 0 for t in timings)
    assert not {"seconds", "tokens_per_second", "mfu", "padding"} & set(records[0])


def test_without_teachers_it_is_sft_alone(start):
    record = start("job", teachers=[], steps=1, fusion={})[3][0]
    assert record["loss"] == pytest.approx(record["sft"])
    assert "fusion" not in record


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_lower_precision_stays_near_the_full_one(start, precision):
    full, low = start("full", steps=1)[3][0], start("low", steps=1, precision=precision)[3][0]
    assert low["loss"] != full["loss"]
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_a_loss_that_is_not_a_number_stops_with_step_samples_and_rate(start, mix, tokenizer):
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as told:
        start("nan", spoil=lambda model: model.model.norm.weight.data.fill_(torch.nan))
    message = str(told.value)
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
    ("spoil", "found"),
    [(no_gradient(torch.nan), "nan"), (no_gradient(torch.inf), "inf"), (no_logit_of_any_label, "inf")],
    ids=["gradient not a number", "infinite gradient", "infinite loss"],
)
def test_a_gradient_or_loss_that_is_not_finite_stops_the_same_way(start, mix, tokenizer, tmp_path, spoil, found):
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as told:
        start("wrong", teachers=[], fusion={}, spoil=spoil)
    message = str(told.value)
    assert message.startswith(f"step 1 of 12: loss or gradient is {found} at learning rate 0.01; samples ")
    assert all(name in message for name in ids)
    assert not list((tmp_path / "wrong" / "out").iterdir())


@pytest.mark.parametrize("name", ["hidden", "entropy"])
def test_a_teacher_that_turns_out_not_finite_stops_the_same_way(start, teachers, mix, tokenizer, monkeypatch, name):
    batch = CachedTeacher.batch

    def spoilt(self, samples, labels):
        rows = batch(self, samples, labels)
        getattr(rows, name)[0] = torch.nan
        return rows

    monkeypatch.setattr(CachedTeacher, "batch", spoilt)
    ids, _ = first_batch(mix, tokenizer)
    with pytest.raises(UserError) as told:
        start("wrong", teachers=teachers)
    assert str(told.value).startswith("step 1 of 12: loss or gradient is nan at learning rate 0.01; samples ")
    assert all(sample in str(told.value) for sample in ids)


def test_the_reserve_is_the_start_and_a_step_and_a_save_a_fifth_slower_than_the_slowest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    reserve = module.SaveDeadline(
        parameters=10**9
    )  # 12 GB of resume state at 200 MB/s: 60 s, until one has been measured
    assert reserve.seconds(minutes=600) == pytest.approx(60 + 1.2 * 60)
    assert reserve.seconds(minutes=1) == pytest.approx(15 + 1.2 * 60)  # a short job keeps a quarter for its start
    for took in (3, 8, 2):
        with reserve.step():
            now[0] += took
    for took in (20, 30, 10):
        with reserve.save():
            now[0] += took
    assert reserve.seconds(minutes=600) == pytest.approx(60 + 1.2 * (8 + 30))
