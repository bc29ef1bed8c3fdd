"""Caches of most likely tokens and of no states at all, against the teacher itself; and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample, encode
from llmfusion.errors import UserError
from llmfusion.fusion import teacher as teacher_module
from llmfusion.fusion.distributions import TeacherHead, TopKDistribution
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.teacher import CachedTeacher, ProjectedTeacher, load_teacher
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model
from llmfusion.models.scratch import make_tokenizer
from llmfusion.study.kinds.capture_teacher import row_bytes
from llmfusion.study.schema.base_models import Tokenizer
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.settings import Capture
from llmfusion.study.schema.training import TrainedModel
from llmfusion.teachers.cache import TeacherCache
from llmfusion.teachers.capture import capture
from llmfusion.teachers.online import OnlineHiddenStates, online_source
from llmfusion.training.corpus import Corpus, read_ahead
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import artifact

IDS = ["s03", "twice", "c02", "raw"]


def cached(folder, teacher, mix, **options):
    """A cache with the spec that these options of the capture would have."""
    facts = capture(teacher, mix, folder, Capture(**options), None)
    made = artifact(folder, **facts)
    return Artifact(folder, {**made.manifest, "spec": json.dumps({"capture": options})}, made.sha256)


@pytest.fixture(scope="module")
def topk(tmp_path_factory, teacher, mix):
    return cached(tmp_path_factory.mktemp("topk"), teacher, mix, kind="topk", k=7, dtype="float32")


@pytest.fixture(scope="module")
def online(tmp_path_factory, teacher, mix):
    return cached(tmp_path_factory.mktemp("online"), teacher, mix, kind="online", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def chosen(samples, tokenizer):
    by_id = {s["id"]: s for s in samples}
    return [TokenizedSample(by_id[i], encode(by_id[i], tokenizer, 128)) for i in IDS]


@pytest.fixture(scope="module")
def own(teacher, chosen):
    """The teacher's own log-probabilities at the label rows, float64."""
    model = load_model(teacher, "float32").double()
    with torch.no_grad():
        return torch.cat(
            [model(torch.tensor([d.encoded.ids])).logits[0, label_positions(d.encoded)].log_softmax(-1) for d in chosen]
        )


def rows_of(teacher, chosen):
    """The teacher's distributions at the label positions of the chosen samples."""
    return teacher.distribution([s.sample for s in chosen], [s.encoded.label_ids for s in chosen])


# -------------------------------------------------------------------------------------------- the k most likely tokens
def test_the_k_most_likely_tokens_with_exact_statistics(topk, tokenizer, chosen, own):
    rows = rows_of(CachedTeacher("t", topk, tokenizer, 300, "cpu"), chosen)
    best, ids = own.topk(7)
    expected = torch.full_like(own, -torch.inf)
    for row in range(len(own)):
        total = best[row].exp().sum().log()
        for value, i in zip(best[row], ids[row], strict=True):
            expected[row, i] = value - total
    torch.testing.assert_close(rows.log_probs(slice(0, 9999), 1.0).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.log_probs(torch.tensor([5, 2]), 1.0).double(), expected[[5, 2]], rtol=0, atol=1e-5)
    labels = torch.tensor([y for d in chosen for y in d.encoded.label_ids])
    entropy = -(own.exp() * own).sum(-1)  # of the whole distribution
    torch.testing.assert_close(rows.entropy.double(), entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.cross_entropy.double(), -own[torch.arange(len(own)), labels], rtol=0, atol=1e-5)
    tail = torch.cat([TeacherCache(topk).rows(d.sample["id"])["tail"] for d in chosen])
    torch.testing.assert_close(tail.double(), 1 - best.exp().sum(1), rtol=0, atol=1e-6)


def test_a_row_of_k_tokens_takes_eight_bytes_each_and_twenty(topk):
    [path] = topk.folder.glob("piece-*.safetensors")
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == topk.facts["rows"] * (7 * 8 + 20)
    assert row_bytes(Capture(kind="topk", k=7), 4096) == 7 * 8 + 20
    tail = load_file(path)["tail"]
    assert topk.facts["tail"] == pytest.approx(float(tail.double().mean()), rel=1e-9)
    assert topk.facts["k"] == 7


def test_the_loss_over_k_tokens_is_that_of_the_renormalised_distribution(topk, tokenizer, chosen, own, pivot):
    rows = rows_of(CachedTeacher("t", topk, tokenizer, 300, "cpu"), chosen)
    student = load_model(pivot, "float32")
    with torch.no_grad():
        hidden = torch.cat(
            [
                student.base_model(torch.tensor([d.encoded.ids])).last_hidden_state[0, label_positions(d.encoded)]
                for d in chosen
            ]
        )
    labels = torch.tensor([y for d in chosen for y in d.encoded.label_ids])
    result = fused_loss(hidden, student.lm_head.weight, None, labels, [rows], torch.ones(len(labels), 1), 1.0)
    log_p = (hidden.double() @ student.lm_head.weight.detach().double().T).log_softmax(-1)
    best, ids = own.topk(7)
    q = best.softmax(-1)
    expected = (q * (q.log() - log_p.gather(1, ids))).sum()
    assert result.loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_tokens_the_student_lacks_leave_the_k_and_rows_without_others_are_masked():
    ids = torch.tensor([[1, 9], [0, 2], [9, 8]], dtype=torch.int32)
    values = torch.tensor([[0.5, 0.3], [0.6, 0.2], [0.7, 0.1]]).log()
    ones = torch.ones(3)
    head = TeacherHead(torch.zeros(10, 2), None, torch.arange(6), 6)
    rows = TopKDistribution(ids, values, head, ones, ones, ones)
    log_probs = rows.log_probs(slice(0, 3), 1.0)
    assert log_probs.shape == (3, 6)
    expected = torch.tensor([[0, 1, 0, 0, 0, 0], [0.75, 0, 0.25, 0, 0, 0], [0] * 6])
    torch.testing.assert_close(log_probs.exp(), expected)
    assert rows.mask.tolist() == [1, 1, 0]
    with pytest.raises(UserError, match=r"temperature 2.0: .* kind topk is known at temperature 1 only"):
        rows.log_probs(slice(0, 3), 2.0)


OPTIONS = {"init": "base/p", "mix": "m", "batch_size": 4, "lr": 1e-2, "seed": 3}


def trained(folder, pivot, tokenizer, mix, teachers, steps, **fusion):
    """The result of a training with these teachers."""
    names = [f"base/{teacher.name}" for teacher in teachers]
    run = TrainedModel.model_validate({**OPTIONS, "steps": steps, "teachers": names, "fusion": fusion})
    student = Student(load_model(pivot, "float32"), tokenizer)
    return train(student, run, run.fusion, [mix], teachers, folder / "state", "key")


def test_a_training_learns_from_k_tokens(tmp_path, topk, cache, mix, pivot, tokenizer):
    records = {}
    for name, artifact_of_teachers in (("topk", topk), ("hidden", cache)):
        teachers = [CachedTeacher(f"{i}", artifact_of_teachers, tokenizer, 300, "cpu") for i in range(2)]
        records[name] = trained(tmp_path / name, pivot, tokenizer, mix, teachers, 12, target="mince").records
    first = records["topk"][0]
    assert records["topk"][-1]["fusion"] < first["fusion"]
    assert first["weight"] == records["hidden"][0]["weight"]  # its choice rests on the same statistics
    assert first["cross_entropy"] == pytest.approx(records["hidden"][0]["cross_entropy"])
    assert first["sft"] == pytest.approx(records["hidden"][0]["sft"], rel=1e-5)


def test_a_teacher_of_another_vocabulary_cannot_be_projected_from_k_tokens(topk, mix):
    other = make_tokenizer(Tokenizer(vocabulary_size=290), mix.file("samples.jsonl"), None)
    with pytest.raises(UserError, match=r"teacher t has another vocabulary .* kind topk has no states to project"):
        load_teacher("t", topk, other, 290, "cpu", FusionOptions(target="kd"))


def test_more_tokens_than_the_teacher_knows_are_refused(tmp_path, teacher, mix):
    with pytest.raises(UserError, match=r"k is 301, .* knows 300 tokens"):
        capture(teacher, mix, tmp_path, Capture(kind="topk", k=301, dtype="float32"), None)


# ----------------------------------------------------------------------------------------------- the teacher in memory
def test_an_online_teacher_says_what_its_cache_would(online, cache, teacher, mix, tokenizer, chosen):
    source = CachedTeacher("t", online, tokenizer, 300, "cpu", OnlineHiddenStates("t", teacher, online, mix, "cpu"))
    now, then = rows_of(source, chosen), rows_of(CachedTeacher("t", cache, tokenizer, 300, "cpu"), chosen)
    torch.testing.assert_close(now.hidden, then.hidden, rtol=0, atol=1e-5)
    for name in ("entropy", "cross_entropy", "mask"):
        torch.testing.assert_close(getattr(now, name), getattr(then, name), rtol=0, atol=1e-5)
    torch.testing.assert_close(now.log_probs(slice(0, 99), 2.0), then.log_probs(slice(0, 99), 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "online"])
def test_the_divergence_is_that_of_the_rows_at_hand_in_bfloat16(tmp_path, kind, teacher, mix, tokenizer, pivot, chosen):
    """A teacher that is run again has other states than those its stored entropies are of; a cached one has not."""
    made = cached(tmp_path, teacher, mix, kind=kind, batch_size=2)
    states = OnlineHiddenStates("t", teacher, made, mix, "cpu") if kind == "online" else None
    rows = rows_of(CachedTeacher("t", made, tokenizer, 300, "cpu", states), chosen)
    head = load_model(pivot, "float32").lm_head.weight
    labels = torch.tensor([y for d in chosen for y in d.encoded.label_ids])
    if kind == "online":
        rows.entropy = rows.entropy + 0.01  # as far away as rounding may bring it
    student = torch.randn(len(labels), head.shape[1], generator=torch.Generator().manual_seed(0))
    result = fused_loss(student, head, None, labels, [rows], torch.ones(len(labels), 1), 1.0)
    log_q = rows.log_probs(slice(0, len(labels)), 1.0).double()
    log_p = (student.double() @ head.detach().double().T).log_softmax(-1)
    assert result.loss.item() == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-5)


def test_an_online_cache_holds_sixteen_bytes_a_row(online):
    [path] = online.folder.glob("piece-*.safetensors")
    assert set(load_file(path)) == {"label_id", "label_logprob", "entropy", "logsumexp"}
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == online.facts["rows"] * 16
    assert row_bytes(Capture(kind="online"), 4096) == 16


@pytest.mark.parametrize("projected", [False, True])
def test_a_training_with_an_online_teacher_is_that_with_a_cached_one(
    tmp_path, online, cache, teacher, mix, pivot, tokenizer, projected
):
    states = OnlineHiddenStates("t", teacher, online, mix, "cpu")
    loss = {}
    for name, stored, source in (("cached", cache, None), ("online", online, states)):
        if projected:
            made = ProjectedTeacher("t", stored, tokenizer, "cpu", states=source)
        else:
            made = CachedTeacher("t", stored, tokenizer, 300, "cpu", source)
        result = trained(tmp_path / name, pivot, tokenizer, mix, [made], 6, target="kd", projector_lr=1e-2)
        loss[name] = result.facts["loss"]
    assert loss["online"] == pytest.approx(loss["cached"], rel=1e-4)


def test_an_online_teacher_in_bfloat16_is_near_its_cache(tmp_path, teacher, mix, tokenizer, chosen, own):
    made = cached(tmp_path, teacher, mix, kind="online", batch_size=2)
    rows = rows_of(
        CachedTeacher("t", made, tokenizer, 300, "cpu", online_source("t", made, mix, teacher, "cpu")), chosen
    )
    assert rows.hidden.dtype == torch.bfloat16
    divergence = (own.exp() * (own - rows.log_probs(slice(0, 9999), 1.0).double())).sum(-1)
    assert 0 < float(divergence.mean()) < 1e-2


def test_a_cache_without_states_needs_the_teacher(online, cache, mix, teacher, tokenizer):
    with pytest.raises(UserError, match=r"holds no states \(kind online\)"):
        CachedTeacher("t", online, tokenizer, 300, "cpu")
    with pytest.raises(UserError, match="the teacher is not among this training's inputs"):
        online_source("t", online, mix, None, "cpu")
    assert online_source("t", cache, mix, teacher, "cpu") is None


# ---------------------------------------------------------------------------------------------- what is computed again
@pytest.mark.parametrize("projected", [False, True])
def test_states_of_another_teacher_are_refused_with_the_figure(tmp_path, cache, tokenizer, chosen, projected):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in cache.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "piece-00000.safetensors")
    tensors["hidden"] = tensors["hidden"] + 1e-3  # too little to see in anything but the figure
    save_file(tensors, folder / "piece-00000.safetensors")
    figure = r"computed again, is [\d.e-]+ nats from the cached one \(allowed: [\d.e-]+\)"
    with pytest.raises(UserError, match=rf"teacher t: .*the labels' cross-entropy, {figure}"):
        use(artifact(folder, **cache.facts), tokenizer, chosen, projected)
    use(cache, tokenizer, chosen, projected)


def use(cache, tokenizer, chosen, projected):
    if not projected:
        return rows_of(CachedTeacher("t", cache, tokenizer, 300, "cpu"), chosen)
    teacher = ProjectedTeacher("t", cache, tokenizer, "cpu")
    sizes = [len(s.encoded.label_ids) for s in chosen]
    ids = torch.tensor([y for s in chosen for y in s.encoded.label_ids])
    hidden, embedding, head = torch.randn(sum(sizes), 16), torch.randn(300, 16), torch.randn(300, 16)
    student = StudentBatch(hidden, ids, ids, sizes, embedding, head)
    return teacher.output(chosen, student, teacher.projectors(16), 1.0)


def test_a_head_of_another_teacher_and_wrong_statistics_are_refused(tmp_path, cache, topk, tokenizer, chosen):
    for of, name in (
        (cache, "head.safetensors"),
        (cache, "piece-00000.safetensors"),
        (topk, "piece-00000.safetensors"),
    ):
        folder = tmp_path / f"{of.facts['kind']}-{name}"
        folder.mkdir()
        for path in of.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / name)
        key = "weight" if name.startswith("head") else "label_logprob" if of is cache else "top_logprob"
        tensors[key] = tensors[key] * 1.01
        save_file(tensors, folder / name)
        with pytest.raises(UserError, match="computed again"):
            rows_of(CachedTeacher("t", artifact(folder, **of.facts), tokenizer, 300, "cpu"), chosen)


def test_the_figure_is_taken_once(cache, tokenizer, chosen, monkeypatch):
    calls = []
    monkeypatch.setattr(teacher_module, "require_recomputed", lambda *_: calls.append(1))
    teacher = CachedTeacher("t", cache, tokenizer, 300, "cpu")
    rows_of(teacher, chosen)
    rows_of(teacher, chosen[:2])
    assert calls == [1]


def test_teachers_prefetch_the_next_step_and_the_trainer_sees_the_same_steps(mix, tokenizer):
    corpus = Corpus([mix], tokenizer)
    run = TrainedModel.model_validate({**OPTIONS, "epochs": 1})
    prefetched, seen = [], []

    class Listening:
        def prefetch(self, batch):
            prefetched.append([s.sample["id"] for s in batch])

    def samples_of(indices):
        return [corpus.samples[i] for i in indices]

    for step, indices in read_ahead(corpus.batches(run, 2, 9), samples_of, [Listening(), Listening()]):
        seen.append((step, indices))
        following = min(len(seen), 6)
        assert len(prefetched) == 2 * following  # of the step after this one, before this one begins
    assert seen == list(corpus.batches(run, 2, 9))
    expected = [[s.sample["id"] for s in samples_of(indices)] for _, indices in seen[1:]]
    assert prefetched[::2] == prefetched[1::2] == expected
