"""The objective over every kind of teacher: cached equals online, micro-batches do not matter, projectors are prepared and resumed."""

import json
import os
import signal

import pytest
import torch

from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.fusion.dskd import StudentBatch, TeacherBatch, dual_space, input_ids
from llmfusion.fusion.objective import Objective
from llmfusion.fusion.teacher import CachedTeacher, ProjectedTeacher, TokenizedSample, load_teacher
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model, load_tokenizer, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.teachers.alignment import match_spans, responses, row_spans, token_bytes
from llmfusion.teachers.capture import capture
from llmfusion.training import loop as module
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import artifact, job

SPEC = {"steps": 8, "batch_size": 4, "lr": 1e-2, "lr_min": 1e-3, "seed": 3}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
FUSION = {"projector_lr": 1e-2, "projector_steps": 3}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, mix):
    """The cache of a GPT-NeoX with a tokenizer of its own, and the model."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tokenizer({"vocabulary_size": 284, "digits": 1}, mix.file("samples.jsonl"), None)
    model = make_model(NEOX, tokenizer, 5)
    save_model(model, tokenizer, folder, "float32")
    facts = capture(artifact(folder), mix, folder, {"dtype": "float32", "batch_size": 8}, None)
    return artifact(folder, **facts), model.eval()


def source(foreign, tokenizer, **options):
    return ProjectedTeacher("far", foreign[0], tokenizer, "cpu", **options)


@pytest.fixture
def go(tmp_path, pivot, tokenizer, mix, cache, foreign):
    def run(name, fusion, teachers=("near", "far"), spec=None, minutes=None, spoil=lambda loop: None):
        made = job(tmp_path, name=name, minutes=minutes)
        model = load_model(pivot, "float32")
        given = {**SPEC, **(spec or {}), "fusion": {**FUSION, **fusion}}
        caches = {"near": cache, "far": foreign[0]}
        sources = [load_teacher(t, caches[t], tokenizer, 300, "cpu", given["fusion"]) for t in teachers]
        train(made, Student(model, tokenizer), given, [mix], sources)
        return model.state_dict(), [
            json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()
        ]

    return run


def student_of(pivot, tokenizer, samples):
    model, drawn = load_model(pivot, "float32"), [TokenizedSample(s, encode(s, tokenizer, 128)) for s in samples]
    with torch.no_grad():
        hidden = torch.cat(
            [
                model.base_model(torch.tensor([d.encoded.ids])).last_hidden_state[0, label_positions(d.encoded)]
                for d in drawn
            ]
        )
    inputs = torch.tensor([d.encoded.ids[i] for d in drawn for i in label_positions(d.encoded)])
    labels = [d.encoded.label_ids for d in drawn]
    flat = torch.tensor([y for sample in labels for y in sample])
    head = model.get_output_embeddings().weight
    return drawn, StudentBatch(
        hidden, inputs, flat, [len(y) for y in labels], model.get_input_embeddings().weight, head
    )


def test_the_source_is_chosen_by_vocabulary(cache, foreign, tokenizer):
    assert isinstance(load_teacher("n", cache, tokenizer, 300, "cpu", {}), CachedTeacher)
    far = load_teacher("f", foreign[0], tokenizer, 300, "cpu", {"align": "exact", "score": "own"})
    assert isinstance(far, ProjectedTeacher)
    assert (far.exact, far.own) == (True, True)


@pytest.mark.parametrize("align", ["cma", "exact"])
def test_a_projected_teacher_from_the_cache_is_the_one_from_the_model(foreign, pivot, tokenizer, samples, align):
    cache, model = foreign
    theirs = load_tokenizer(cache, None)
    drawn, student = student_of(pivot, tokenizer, samples[18:])
    far = source(foreign, tokenizer, align=align)
    torch.manual_seed(0)
    projectors = far.projectors(16)
    found = far.view(drawn, student, projectors, 1.5).space
    encoded = [encode(d.sample, theirs, 128) for d in drawn]
    with torch.no_grad():
        hidden = torch.cat(
            [model.base_model(torch.tensor([e.ids])).last_hidden_state[0, label_positions(e)] for e in encoded]
        )
    inputs = torch.tensor([e.ids[i] for e in encoded for i in label_positions(e)])
    labels = [e.label_ids for e in encoded]
    teacher = TeacherBatch(
        far.space, hidden, inputs, torch.tensor([y for sample in labels for y in sample]), [len(y) for y in labels]
    )
    matched = None
    if align == "exact":
        matched, first = [], 0
        for d, e in zip(drawn, encoded, strict=True):
            texts = responses(d.sample)
            ours = row_spans(token_bytes(tokenizer), d.encoded.label_ids, d.encoded.segments()[0], texts)
            other = row_spans(token_bytes(theirs), e.label_ids, e.segments()[0], texts)
            rows = match_spans(ours, other)
            matched.append(torch.where(rows < 0, rows, rows + first))
            first += len(e.label_ids)
        matched = torch.cat(matched)
        assert 0 < float(found.aligned.mean()) < 1
    expected = dual_space(projectors, student, teacher, 1.5, matched)
    for name in ("t2s_ce", "s2t_kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.rows.log_probs(slice(0, 999), 1.0), expected.rows.log_probs(slice(0, 999), 1.0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(found.rows.mask, expected.rows.mask)
    assert far.rows_of(drawn) == sum(map(len, labels))


def test_input_tokens_are_those_the_teacher_read(foreign, tokenizer, samples):
    theirs = load_tokenizer(foreign[0], None)
    far = source(foreign, tokenizer)
    for sample in samples:
        e, entry = encode(sample, theirs, 128), far.cache.entry(sample["id"])
        found = input_ids(torch.tensor(e.label_ids), entry["segment_starts"], entry["segment_prompts"])
        assert found.tolist() == [e.ids[i] for i in label_positions(e)]


def test_own_scores_keep_each_samples_total(foreign, pivot, tokenizer, samples):
    drawn, student = student_of(pivot, tokenizer, samples[:5])
    far = source(foreign, tokenizer, score="own")
    rows = far.view(drawn, student, far.projectors(16), 1.0).rows
    totals = [float(-far.cache.rows(d.sample["id"])["label_logprob"].sum()) for d in drawn]
    sizes, first = student.sizes, 0
    for size, total in zip(sizes, totals, strict=True):
        assert float(rows.cross_entropy[first : first + size].sum()) == pytest.approx(total, rel=1e-5)
        first += size


def test_a_response_that_is_not_the_cached_one_is_refused(foreign, pivot, tokenizer, samples):
    changed = json.loads(json.dumps(samples[0]))
    changed["messages"][1]["content"] += " "
    drawn, student = student_of(pivot, tokenizer, [changed])
    far = source(foreign, tokenizer)
    with pytest.raises(UserError, match="teacher far: sample s00: its cached response is not the mix's"):
        far.view(drawn, student, far.projectors(16), 1.0)


TARGETS = [{"target": "naive"}, {"target": "minilogit"}, {"target": "mince"}, {"target": "udf"}, {"target": "udf", "align": "exact"},
           {"target": "udf", "score": "own"}, {"target": "naive", "divergence": "reverse_kl"}, {"target": "mince", "divergence": "js", "temperature": 2.0}]  # fmt: skip


@pytest.mark.parametrize("fusion", TARGETS, ids=lambda f: "-".join(map(str, f.values())))
def test_micro_batches_change_neither_loss_nor_gradient(go, fusion):
    whole, split = (
        go(name, fusion, spec={"steps": 2, **more})[1]
        for name, more in (("whole", {}), ("split", {"micro_batch_size": 1}))
    )
    for a, b in zip(whole, split, strict=True):
        for name in ("loss", "sft", "fusion", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=2e-4), name
        for name in ("weight", "usable", "cross_entropy", "t2s_ce", "s2t_kl", "aligned"):
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), name


def test_one_projected_teacher_is_dskd(go):
    [record] = go("dskd", {"target": "kd", "lambda": 0.3}, ["far"], {"steps": 1})[1]
    expected = 0.7 * record["sft"] + 0.3 * (record["fusion"] + record["t2s_ce"]["far"] + record["s2t_kl"]["far"])
    assert record["loss"] == pytest.approx(expected, rel=1e-6)
    assert record["weight"] == record["usable"]


def test_teachers_of_both_kinds_share_one_loss_and_projected_terms_are_averaged_over_the_projected(go):
    [record] = go("both", {"target": "udf"}, spec={"steps": 1})[1]
    assert record["loss"] == pytest.approx(
        0.5 * record["sft"] + 0.5 * (record["fusion"] + record["t2s_ce"]["far"] + record["s2t_kl"]["far"]), rel=1e-6
    )
    assert set(record["t2s_ce"]) == {"far"}
    assert record["usable"]["near"] == 1.0


def test_projectors_are_prepared_without_touching_the_student(go, monkeypatch, pivot):
    seen = {}
    prepare = module._Loop._prepare_projectors

    def watched(self, *given):
        before = {name: t.clone() for name, t in self.trained.state_dict().items()}
        prepare(self, *given)
        after = self.trained.state_dict()
        seen["changed"] = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    monkeypatch.setattr(module._Loop, "_prepare_projectors", watched)
    go("job", {"target": "kd"}, ["far"], {"steps": 1})
    assert seen["changed"] == {"objective"}


def test_a_run_with_projectors_that_was_stopped_goes_on_bit_for_bit(go, monkeypatch):
    whole, records = go("whole", {"target": "udf"})
    step = module._Loop._step

    def interrupted(self, number, samples):
        step(self, number, samples)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", interrupted)
        with pytest.raises(SystemExit):
            go("stopped", {"target": "udf"})
    monkeypatch.setattr(module.Objective, "projection", lambda *_: pytest.fail("prepared again"))
    again, more = go("stopped", {"target": "udf"})
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert records == more


def test_projectors_half_prepared_when_the_jobs_time_ends_are_gone_on_with(go, monkeypatch, capsys):
    whole, records = go("whole", {"target": "udf"})
    projection, made = Objective.projection, []
    monkeypatch.setattr(Objective, "projection", lambda *given: made.append(1) or projection(*given))
    for number in range(3):  # each job ends after one step
        with pytest.raises(SystemExit):
            go("short", {"target": "udf"}, minutes=0.0)
        assert f"stopped after step {number + 1} of " in capsys.readouterr().out
    assert len(made) == 3
    again, more = go("short", {"target": "udf"})
    assert len(made) == 3
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert records == more


def test_projectors_have_a_learning_rate_of_their_own(go, monkeypatch):
    rates = []
    update = module._Loop._update

    def watched(self, *check):
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        return update(self, *check)

    monkeypatch.setattr(module._Loop, "_update", watched)
    go("job", {"target": "kd", "projector_lr": 5e-2}, ["far"], {"steps": 4})
    assert [r[1] / r[0] for r in rates] == pytest.approx([5.0] * 7)
    assert rates[0][1] == pytest.approx(5e-2)  # before the first step, at its peak
    assert rates[-1][1] < rates[3][1]


def test_the_pivot_may_compete_with_a_source_under_mince(go, cache, pivot, tokenizer, mix, tmp_path):
    """FuseLLM's pairwise fusion: on each sample the teacher with the lower cross-entropy, the frozen pivot among them."""
    folder = tmp_path / "frozen"
    save_model(load_model(pivot, "float32"), tokenizer, folder, "float32")
    facts = capture(artifact(folder), mix, folder, {"dtype": "float32"}, None)
    made = job(tmp_path, name="pairwise")
    sources = [
        CachedTeacher("near", cache, tokenizer, 300, "cpu"),
        CachedTeacher("pivot", artifact(folder, **facts), tokenizer, 300, "cpu"),
    ]
    train(
        made,
        Student(load_model(pivot, "float32"), tokenizer),
        {**SPEC, "steps": 1, "fusion": {"target": "mince"}},
        [mix],
        sources,
    )
    [record] = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["weight"].values()) == pytest.approx(1)


def test_a_stop_after_the_projectors_were_prepared_does_not_prepare_them_again(go, monkeypatch):
    """The first step is killed without a chance to save; what is gone on from is the state after the preparation."""

    def killed(self, step, numbers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            go("stopped", {"target": "kd"})
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "projection", lambda *_: pytest.fail("prepared again"))
        weights, records = go("stopped", {"target": "kd"})
    whole, whole_records = go("whole", {"target": "kd"})
    assert records == whole_records
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
