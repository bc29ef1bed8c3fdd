"""The objective over every kind of teacher: cached is online, any micro-batches, projectors prepared and resumed."""

import json
import os
import signal
import time

import pytest
import torch

from llmfusion.data.chat import TokenizedSample, encode
from llmfusion.errors import UserError
from llmfusion.fusion.dskd import TeacherBatch, dual_space, input_ids
from llmfusion.fusion.objective import Objective
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.teacher import CachedTeacher, ProjectedTeacher, load_teacher
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model, load_tokenizer, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.study.schema.base_models import Architecture, Tokenizer
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.settings import Capture
from llmfusion.study.schema.training import Training
from llmfusion.teachers.alignment import match_spans, responses, row_spans, token_bytes
from llmfusion.teachers.capture import capture
from llmfusion.training import loop as module
from llmfusion.training.loop import Student, train
from llmfusion.training.save_deadline import TimeLimit
from tests.unit.fusion.stand_ins import fusion_options
from tests.unit.stand_ins import artifact

RUN = {"steps": 8, "batch_size": 4, "lr": 1e-2, "lr_min": 1e-3, "seed": 3}
NEOX = Architecture(
    model_type="gpt_neox",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.3,
)
FUSION = {"projector_lr": 1e-2, "projector_steps": 3}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, mix):
    """The cache of a GPT-NeoX with a tokenizer of its own, and the model."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tokenizer(Tokenizer(vocabulary_size=284, digits=1), mix.file("samples.jsonl"), None)
    model = make_model(NEOX, tokenizer, 5)
    save_model(model, tokenizer, folder, "float32")
    facts = capture(artifact(folder), mix, folder, Capture(dtype="float32", batch_size=8), None)
    return artifact(folder, **facts), model.eval()


def projected_teacher(foreign, tokenizer, **options):
    return ProjectedTeacher("far", foreign[0], tokenizer, "cpu", **options)


@pytest.fixture
def go(tmp_path, pivot, tokenizer, mix, cache, foreign):
    """Trains the pivot with teachers of its own and of another vocabulary; returns its weights and the records."""

    def run(name, fusion, teachers=("near", "far"), changed=None, minutes=None):
        model = load_model(pivot, "float32")
        options = fusion if isinstance(fusion, FusionOptions) else fusion_options(**{**FUSION, **fusion})
        caches = {"near": cache, "far": foreign[0]}
        loaded = [load_teacher(t, caches[t], tokenizer, 300, "cpu", options) for t in teachers]
        settings = Training(mix="m", **{**RUN, **(changed or {})})
        limit = None if minutes is None else TimeLimit(minutes, time.monotonic())
        result = train(Student(model, tokenizer), settings, options, [mix], loaded, tmp_path / name, "f", limit)
        return model.state_dict(), result.records

    return run


def student_of(pivot, tokenizer, samples):
    model = load_model(pivot, "float32")
    batch = [TokenizedSample(s, encode(s, tokenizer, 128)) for s in samples]
    with torch.no_grad():
        hidden = torch.cat(
            [
                model.base_model(torch.tensor([d.encoded.ids])).last_hidden_state[0, label_positions(d.encoded)]
                for d in batch
            ]
        )
    inputs = torch.tensor([d.encoded.ids[i] for d in batch for i in label_positions(d.encoded)])
    labels = [d.encoded.label_ids for d in batch]
    flat = torch.tensor([y for sample in labels for y in sample])
    head = model.get_output_embeddings().weight
    return batch, StudentBatch(
        hidden, inputs, flat, [len(y) for y in labels], model.get_input_embeddings().weight, head
    )


def test_the_kind_of_teacher_is_chosen_by_vocabulary(cache, foreign, tokenizer):
    assert isinstance(load_teacher("n", cache, tokenizer, 300, "cpu", fusion_options()), CachedTeacher)
    far = load_teacher("f", foreign[0], tokenizer, 300, "cpu", fusion_options(align="exact", score="own"))
    assert isinstance(far, ProjectedTeacher)
    assert (far.exact, far.own_scores) == (True, True)


@pytest.mark.parametrize("align", ["cma", "exact"])
def test_a_projected_teacher_from_the_cache_is_the_one_from_the_model(foreign, pivot, tokenizer, samples, align):
    cache, model = foreign
    theirs = load_tokenizer(cache, None)
    batch, student = student_of(pivot, tokenizer, samples[18:])
    far = projected_teacher(foreign, tokenizer, align=align)
    torch.manual_seed(0)
    projectors = far.projectors(16)
    found = far.output(batch, student, projectors, 1.5).dual_space
    encoded = [encode(d.sample, theirs, 128) for d in batch]
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
        for d, e in zip(batch, encoded, strict=True):
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
        found.distribution.log_probs(slice(0, 999), 1.0),
        expected.distribution.log_probs(slice(0, 999), 1.0),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(found.distribution.mask, expected.distribution.mask)
    assert far.label_count(batch) == sum(map(len, labels))


def test_input_tokens_are_those_the_teacher_read(foreign, tokenizer, samples):
    theirs = load_tokenizer(foreign[0], None)
    far = projected_teacher(foreign, tokenizer)
    for sample in samples:
        e, entry = encode(sample, theirs, 128), far.cache.entry(sample["id"])
        found = input_ids(torch.tensor(e.label_ids), entry["segment_starts"], entry["segment_prompts"])
        assert found.tolist() == [e.ids[i] for i in label_positions(e)]


def test_own_scores_keep_each_samples_total(foreign, pivot, tokenizer, samples):
    batch, student = student_of(pivot, tokenizer, samples[:5])
    far = projected_teacher(foreign, tokenizer, score="own")
    rows = far.output(batch, student, far.projectors(16), 1.0).distribution
    totals = [float(-far.cache.rows(d.sample["id"])["label_logprob"].sum()) for d in batch]
    sizes, first = student.sizes, 0
    for size, total in zip(sizes, totals, strict=True):
        assert float(rows.cross_entropy[first : first + size].sum()) == pytest.approx(total, rel=1e-5)
        first += size


def test_a_response_that_is_not_the_cached_one_is_refused(foreign, pivot, tokenizer, samples):
    changed = json.loads(json.dumps(samples[0]))
    changed["messages"][1]["content"] += " "
    batch, student = student_of(pivot, tokenizer, [changed])
    far = projected_teacher(foreign, tokenizer)
    with pytest.raises(UserError, match="teacher far: sample s00: its cached response is not the mix's"):
        far.output(batch, student, far.projectors(16), 1.0)


TARGETS = [
    {"target": "naive"},
    {"target": "minilogit"},
    {"target": "mince"},
    {"target": "udf"},
    {"target": "udf", "align": "exact"},
    {"target": "udf", "score": "own"},
    {"target": "naive", "divergence": "reverse_kl"},
    {"target": "mince", "divergence": "js", "temperature": 2.0},
]


@pytest.mark.parametrize("fusion", TARGETS, ids=lambda f: "-".join(map(str, f.values())))
def test_micro_batches_change_neither_loss_nor_gradient(go, fusion):
    whole, split = (
        go(name, fusion, changed={"steps": 2, **more})[1]
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
    [record] = go("both", {"target": "udf"}, changed={"steps": 1})[1]
    assert record["loss"] == pytest.approx(
        0.5 * record["sft"] + 0.5 * (record["fusion"] + record["t2s_ce"]["far"] + record["s2t_kl"]["far"]), rel=1e-6
    )
    assert set(record["t2s_ce"]) == {"far"}
    assert record["usable"]["near"] == 1.0


def test_projectors_are_prepared_without_touching_the_student(go, monkeypatch, pivot):
    created = []
    seen = {}
    step = module._Loop._step

    class Watched(Objective):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            created.extend(p.detach().clone() for p in self.projectors.parameters())

    def watched(self, *arguments):
        before = load_model(pivot, "float32").state_dict()
        after = self.model.state_dict()
        seen["student"] = any(not torch.equal(before[name], after[name]) for name in before)
        projectors = self.objective.projectors.parameters()
        seen["projectors"] = [not torch.equal(one, p) for one, p in zip(created, projectors, strict=True)]
        step(self, *arguments)

    monkeypatch.setattr(module, "Objective", Watched)
    monkeypatch.setattr(module._Loop, "_step", watched)
    go("job", {"target": "kd"}, ["far"], {"steps": 1})
    assert seen == {"student": False, "projectors": [True] * 6}


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
    monkeypatch.setattr(module.Objective, "projector_loss", lambda *_: pytest.fail("prepared again"))
    again, more = go("stopped", {"target": "udf"})
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert records == more


def test_projectors_half_prepared_when_the_jobs_time_ends_are_gone_on_with(go, monkeypatch, capsys, caplog):
    whole, records = go("whole", {"target": "udf"})
    projector_loss, made = Objective.projector_loss, []
    monkeypatch.setattr(Objective, "projector_loss", lambda *arguments: made.append(1) or projector_loss(*arguments))
    caplog.set_level("INFO")
    for number in range(3):  # each job ends after one step
        with pytest.raises(SystemExit):
            go("short", {"target": "udf"}, minutes=0.0)
        assert f"stopped after step {number + 1} of " in capsys.readouterr().out + caplog.text
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
    go("job", {"target": "kd", "projector_lr": 5e-2}, ["far"], {"steps": 4, "lr_min": 0.0})
    assert [r[1] / r[0] for r in rates] == pytest.approx([5.0] * 7)
    assert rates[0][1] == pytest.approx(5e-2)  # before the first step, at its peak
    assert rates[-1][1] < rates[3][1]


@pytest.mark.parametrize(("projector_lr", "lowest"), [(5e-2, 2e-3), (1e-3, 1e-3)])
def test_the_rates_of_all_groups_end_at_lr_min_as_dskds_scheduler_ends_them(go, monkeypatch, projector_lr, lowest):
    """DSKD (code/utils.py) gives torch's scheduler one eta_min for all groups; a lower peak stays where it is."""
    rates = []
    update = module._Loop._update

    def watched(self, *check):
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        return update(self, *check)

    monkeypatch.setattr(module._Loop, "_update", watched)
    go("job", {"target": "kd", "projector_lr": projector_lr}, ["far"], {"steps": 5, "lr_min": 2e-3})
    before, of_steps = rates[:3], rates[3:]
    assert before == [[1e-2, projector_lr]] * 3  # steps of the projectors alone, at their peak
    for group, (peak, eta_min) in enumerate([(1e-2, 2e-3), (projector_lr, lowest)]):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=eta_min)
        for lr in (step[group] for step in of_steps):
            assert lr == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
            optimizer.step()
            scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(eta_min)


def test_the_pivot_may_compete_with_another_teacher_under_mince(go, cache, pivot, tokenizer, mix, tmp_path):
    """FuseLLM's pairwise fusion: on each sample the teacher with the lower cross-entropy; one is the frozen pivot."""
    folder = tmp_path / "frozen"
    save_model(load_model(pivot, "float32"), tokenizer, folder, "float32")
    facts = capture(artifact(folder), mix, folder, Capture(dtype="float32"), None)
    teachers = [
        CachedTeacher("near", cache, tokenizer, 300, "cpu"),
        CachedTeacher("pivot", artifact(folder, **facts), tokenizer, 300, "cpu"),
    ]
    student = Student(load_model(pivot, "float32"), tokenizer)
    run = Training(mix="m", **{**RUN, "steps": 1})
    [record] = train(student, run, fusion_options("mince"), [mix], teachers, tmp_path / "state", "f").records
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
        patch.setattr(Objective, "projector_loss", lambda *_: pytest.fail("prepared again"))
        weights, records = go("stopped", {"target": "kd"})
    whole, whole_records = go("whole", {"target": "kd"})
    assert records == whole_records
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


# ------------------------------------------------------------------------------------------- a target with parameters
@pytest.fixture
def objectives(monkeypatch):
    """Every objective that a training makes."""
    made = []
    monkeypatch.setattr(module, "Objective", lambda *arguments: made.append(Objective(*arguments)) or made[-1])
    return made


def test_a_learned_targets_parameters_are_trained_at_its_rate_and_recorded(go, gate, objectives, monkeypatch):
    update = module._Loop._update
    before = {}
    rates = []

    def watched(self, *check):
        before.update((n, p.detach().clone()) for n, p in self.objective.target.named_parameters() if n not in before)
        rates.append([group["lr"] / self.optimizer.param_groups[0]["lr"] for group in self.optimizer.param_groups])
        return update(self, *check)

    monkeypatch.setattr(module._Loop, "_update", watched)
    _, records = go("gate", gate(target="gate", target_lr=0.05, projector_lr=1e-2))
    after = {name: parameter.detach() for name, parameter in objectives[0].target.named_parameters()}
    assert set(after) == {"gate.weight", "gate.bias"}
    for name, parameter in after.items():
        assert float((parameter - before[name]).abs().max()) > 1e-3
    assert rates[0] == pytest.approx([1.0, 1.0, 5.0])  # student, projectors, target, in the first step
    assert records[0]["penalty"] > 0
    assert records[0]["weight"] != records[-1]["weight"]


def test_a_stopped_run_with_a_learned_target_goes_on_bit_for_bit(go, gate, objectives, monkeypatch):
    options = gate(target="gate", projector_steps=2)
    whole, records = go("whole", options)
    step = module._Loop._step

    def interrupted(self, number, samples):
        step(self, number, samples)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", interrupted)
        with pytest.raises(SystemExit):
            go("stopped", options)
    again, more = go("stopped", options)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for one, other in zip(objectives[0].parameters(), objectives[-1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert records == more


def test_projectors_are_initialised_alike_under_every_target(foreign, tokenizer, gate):
    """The target is created after the projectors: they draw first from the global generator."""
    found = []
    for options in (fusion_options("naive"), gate(target="gate")):
        torch.manual_seed(0)
        teachers = [projected_teacher(foreign, tokenizer) for _ in range(2)]
        found.append(list(Objective(options, teachers, 16).projectors.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_training_says_once_that_its_projectors_start_untrained(go, caplog):
    caplog.set_level("INFO")
    go("untrained", {"target": "kd", "projector_steps": 0}, ["far"], {"steps": 2})
    hints = [message for message in caplog.messages if message.startswith("note: projectors of teachers")]
    assert len(hints) == 1
    assert "(far)" in hints[0]
    caplog.clear()
    go("trained", {"target": "kd", "projector_steps": 2}, ["far"], {"steps": 2})
    go("same", {"target": "kd", "projector_steps": 0}, ["near"], {"steps": 2})
    assert not [message for message in caplog.messages if "projectors of teachers" in message]
