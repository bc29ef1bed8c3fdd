"""Caches of most likely tokens and of no states at all, against the teacher itself; what is read ahead; and what is refused."""

import ctypes
import json
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import encode
from llmfusion.errors import DamagedError, UserError
from llmfusion.fusion.distributions import TopKDistribution, Vocabulary
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.teacher import CachedTeacher, ProjectedTeacher, TokenizedSample, load_teacher
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model
from llmfusion.models.scratch import make_tokenizer
from llmfusion.steps.capture_teacher import row_bytes
from llmfusion.teachers import cache as cache_module
from llmfusion.teachers.cache import Cache
from llmfusion.teachers.capture import capture
from llmfusion.teachers.online import Online, states_of
from llmfusion.training.corpus import Corpus, read_ahead
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import artifact, job

IDS = ["s03", "twice", "c02", "raw"]


def cached(folder, teacher, mix, **settings):
    """A cache with the spec its settings would have."""
    facts = capture(teacher, mix, folder, settings, None)
    made = artifact(folder, **facts)
    return Artifact(folder, {**made.manifest, "spec": json.dumps({"capture": settings})}, made.sha256)


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


def rows_of(source, chosen):
    return source.batch([d.sample for d in chosen], [d.encoded.label_ids for d in chosen])


# ------------------------------------------------------------------------------------------------ the k most likely tokens
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
    torch.testing.assert_close(
        rows.entropy.double(), -(own.exp() * own).sum(-1), rtol=0, atol=1e-5
    )  # of the whole distribution
    torch.testing.assert_close(rows.cross_entropy.double(), -own[torch.arange(len(own)), labels], rtol=0, atol=1e-5)
    found = [Cache(topk).rows(d.sample["id"]) for d in chosen]
    torch.testing.assert_close(torch.cat([f["tail"] for f in found]).double(), 1 - best.exp().sum(1), rtol=0, atol=1e-6)


def test_a_row_of_k_tokens_takes_eight_bytes_each_and_twenty(topk):
    [path] = topk.folder.glob("piece-*.safetensors")
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == topk.facts["rows"] * (7 * 8 + 20)
    assert row_bytes({"kind": "topk", "k": 7}, 4096) == 7 * 8 + 20
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
    found = fused_loss(hidden, student.lm_head.weight, None, labels, [rows], torch.ones(len(labels), 1), 1.0)
    log_p = (hidden.double() @ student.lm_head.weight.detach().double().T).log_softmax(-1)
    best, ids = own.topk(7)
    q = best.softmax(-1)
    expected = (q * (q.log() - log_p.gather(1, ids))).sum()
    assert found.loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_tokens_the_student_lacks_leave_the_k_and_rows_without_others_are_masked():
    ids = torch.tensor([[1, 9], [0, 2], [9, 8]], dtype=torch.int32)
    values = torch.tensor([[0.5, 0.3], [0.6, 0.2], [0.7, 0.1]]).log()
    ones = torch.ones(3)
    rows = TopKDistribution(ids, values, Vocabulary(torch.zeros(10, 2), None, torch.arange(6), 6), ones, ones, ones)
    found = rows.log_probs(slice(0, 3), 1.0)
    assert found.shape == (3, 6)
    torch.testing.assert_close(found.exp(), torch.tensor([[0, 1, 0, 0, 0, 0], [0.75, 0, 0.25, 0, 0, 0], [0] * 6]))
    assert rows.mask.tolist() == [1, 1, 0]
    with pytest.raises(UserError, match=r"temperature 2.0: .* kind topk is known at temperature 1 only"):
        rows.log_probs(slice(0, 3), 2.0)


def test_a_training_learns_from_k_tokens(tmp_path, topk, cache, mix, pivot, tokenizer):
    spec = {"steps": 12, "batch_size": 4, "lr": 1e-2, "seed": 3, "fusion": {"target": "mince"}}
    told = {}
    for name, of in (("topk", topk), ("hidden", cache)):
        sources = [CachedTeacher(f"{i}", of, tokenizer, 300, "cpu") for i in range(2)]
        made, model = job(tmp_path, name=name), load_model(pivot, "float32")
        train(made, Student(model, tokenizer), spec, [mix], sources)
        told[name] = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = told["topk"][0], told["topk"][-1]
    assert last["fusion"] < first["fusion"]
    assert first["weight"] == told["hidden"][0]["weight"]  # its choice rests on the same statistics
    assert first["cross_entropy"] == pytest.approx(told["hidden"][0]["cross_entropy"])
    assert first["sft"] == pytest.approx(told["hidden"][0]["sft"], rel=1e-5)


def test_a_teacher_of_another_vocabulary_cannot_be_projected_from_k_tokens(topk, mix):
    other = make_tokenizer({"vocabulary_size": 290}, mix.file("samples.jsonl"), None)
    with pytest.raises(UserError, match=r"teacher t has another vocabulary .* kind topk has no states to project"):
        load_teacher("t", topk, other, 290, "cpu", {})


def test_more_tokens_than_the_teacher_knows_are_refused(tmp_path, teacher, mix):
    with pytest.raises(UserError, match=r"k is 301, .* knows 300 tokens"):
        capture(teacher, mix, tmp_path, {"kind": "topk", "k": 301, "dtype": "float32"}, None)


# ------------------------------------------------------------------------------------------------ the teacher in memory
def test_an_online_teacher_says_what_its_cache_would(online, cache, teacher, mix, tokenizer, chosen):
    source = CachedTeacher("t", online, tokenizer, 300, "cpu", Online("t", teacher, online, mix, "cpu"))
    now, then = rows_of(source, chosen), rows_of(CachedTeacher("t", cache, tokenizer, 300, "cpu"), chosen)
    torch.testing.assert_close(now.hidden, then.hidden, rtol=0, atol=1e-5)
    for name in ("entropy", "cross_entropy", "mask"):
        torch.testing.assert_close(getattr(now, name), getattr(then, name), rtol=0, atol=1e-5)
    torch.testing.assert_close(now.log_probs(slice(0, 99), 2.0), then.log_probs(slice(0, 99), 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "online"])
def test_the_divergence_is_that_of_the_rows_at_hand_in_bfloat16(tmp_path, kind, teacher, mix, tokenizer, pivot, chosen):
    """A teacher that is run again has other states than those its stored entropies were taken from: a cached one has not."""
    made = cached(tmp_path, teacher, mix, kind=kind, batch_size=2)
    states = Online("t", teacher, made, mix, "cpu") if kind == "online" else None
    rows, head = (
        rows_of(CachedTeacher("t", made, tokenizer, 300, "cpu", states), chosen),
        load_model(pivot, "float32").lm_head.weight,
    )
    labels = torch.tensor([y for d in chosen for y in d.encoded.label_ids])
    if kind == "online":
        rows.entropy = rows.entropy + 0.01  # as far away as rounding may bring it
    student = torch.randn(len(labels), head.shape[1], generator=torch.Generator().manual_seed(0))
    found = fused_loss(student, head, None, labels, [rows], torch.ones(len(labels), 1), 1.0)
    log_q, log_p = (
        rows.log_probs(slice(0, len(labels)), 1.0).double(),
        (student.double() @ head.detach().double().T).log_softmax(-1),
    )
    assert found.loss.item() == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-5)


def test_an_online_cache_holds_sixteen_bytes_a_row(online):
    [path] = online.folder.glob("piece-*.safetensors")
    assert set(load_file(path)) == {"label_id", "label_logprob", "entropy", "logsumexp"}
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == online.facts["rows"] * 16
    assert row_bytes({"kind": "online"}, 4096) == 16


@pytest.mark.parametrize("projected", [False, True])
def test_a_training_with_an_online_teacher_is_that_with_a_cached_one(
    tmp_path, online, cache, teacher, mix, pivot, tokenizer, projected
):
    spec = {"steps": 6, "batch_size": 4, "lr": 1e-2, "seed": 3, "fusion": {"target": "kd", "projector_lr": 1e-2}}
    loss = {}
    for name, of, states in (("cached", cache, None), ("online", online, Online("t", teacher, online, mix, "cpu"))):
        source = (
            ProjectedTeacher("t", of, tokenizer, "cpu", states=states)
            if projected
            else CachedTeacher("t", of, tokenizer, 300, "cpu", states)
        )
        model = load_model(pivot, "float32")
        loss[name] = train(job(tmp_path, name=name), Student(model, tokenizer), spec, [mix], [source])["loss"]
    assert loss["online"] == pytest.approx(loss["cached"], rel=1e-4)


def test_an_online_teacher_in_bfloat16_is_near_its_cache(tmp_path, teacher, mix, tokenizer, chosen, own):
    made = cached(tmp_path, teacher, mix, kind="online", batch_size=2)
    rows = rows_of(CachedTeacher("t", made, tokenizer, 300, "cpu", states_of("t", made, mix, teacher, "cpu")), chosen)
    assert rows.hidden.dtype == torch.bfloat16
    apart = (own.exp() * (own - rows.log_probs(slice(0, 9999), 1.0).double())).sum(-1)
    assert 0 < float(apart.mean()) < 1e-2


def test_a_cache_without_states_needs_the_teacher(online, cache, mix, teacher, tokenizer):
    with pytest.raises(UserError, match=r"holds no states \(kind online\)"):
        CachedTeacher("t", online, tokenizer, 300, "cpu")
    with pytest.raises(UserError, match="the teacher is not among this training's inputs"):
        states_of("t", online, mix, None, "cpu")
    assert states_of("t", cache, mix, teacher, "cpu") is None


# ------------------------------------------------------------------------------------------------ what is computed again
@pytest.mark.parametrize("projected", [False, True])
def test_states_of_another_teacher_are_refused_with_the_figure(tmp_path, cache, tokenizer, chosen, projected):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in cache.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "piece-00000.safetensors")
    tensors["hidden"] = tensors["hidden"] + 1e-3  # too little to see in anything but the figure
    save_file(tensors, folder / "piece-00000.safetensors")
    with pytest.raises(
        UserError,
        match=r"teacher t: .*the labels' cross-entropy, computed again, is [\d.e-]+ nats from the cached one \(allowed: [\d.e-]+\)",
    ):
        use(artifact(folder, **cache.facts), tokenizer, chosen, projected)
    use(cache, tokenizer, chosen, projected)


def use(cache, tokenizer, chosen, projected):
    if not projected:
        return rows_of(CachedTeacher("t", cache, tokenizer, 300, "cpu"), chosen)
    from llmfusion.fusion.dskd import StudentBatch

    source = ProjectedTeacher("t", cache, tokenizer, "cpu")
    n = sum(len(d.encoded.label_ids) for d in chosen)
    ids = torch.tensor([y for d in chosen for y in d.encoded.label_ids])
    student = StudentBatch(
        torch.randn(n, 16),
        ids,
        ids,
        [len(d.encoded.label_ids) for d in chosen],
        torch.randn(300, 16),
        torch.randn(300, 16),
    )
    return source.view(chosen, student, source.projectors(16), 1.0)


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
    from llmfusion.fusion import teacher as sources

    asked = []
    monkeypatch.setattr(sources, "require_recomputed", lambda *_: asked.append(1))
    source = CachedTeacher("t", cache, tokenizer, 300, "cpu")
    rows_of(source, chosen)
    rows_of(source, chosen[:2])
    assert asked == [1]


# ------------------------------------------------------------------------------------------------ reading
@pytest.fixture
def large(monkeypatch):
    """Caches are read as large ones are."""
    monkeypatch.setattr(cache_module, "SMALL", 0)


def test_a_large_cache_gives_the_rows_of_a_small_one(cache, topk, online, monkeypatch):
    for of in (cache, topk, online):
        states = (lambda samples: []) if of is online else None
        small = Cache(of, states)
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "SMALL", 0)
            whole = Cache(of, states)
        assert (small.small, whole.small) == (True, False)
        for sample in small.index:
            mine, theirs = small.rows(sample), whole.rows(sample)
            assert mine.keys() == theirs.keys()
            assert all(
                torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine
            )


def test_rows_are_read_not_mapped_and_are_the_callers_own(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = Cache(artifact(tmp_path, **cache.facts))
    first = stored.rows("s03")
    expected = {name: tensor.clone() for name, tensor in first.items()}
    first["hidden"].fill_(7)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.rows("s03").items())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_piece_cut_while_it_is_in_use_is_named(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = Cache(artifact(tmp_path, **cache.facts))
    stored.rows("s03")
    os.truncate(tmp_path / "piece-00000.safetensors", 1000)
    with pytest.raises(
        DamagedError, match=r"piece-00000.safetensors: ends before byte \d+: it was cut while it was in use"
    ):
        stored.rows("raw")


def test_prefetching_asks_for_exactly_the_bytes_that_are_read_later(cache, large, monkeypatch):
    stored = Cache(cache)
    advised, read = [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, how: advised.append((start, size, how)))
    preadv = os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda handle, buffers, at: (
            read.append((at, len(buffers[0]), os.POSIX_FADV_WILLNEED)),
            preadv(handle, buffers, at),
        )[1],
    )
    stored.prefetch(["s03", "twice"])
    assert read == []
    for sample in ("s03", "twice"):
        stored.rows(sample)
    assert len(read) == 10
    assert sorted(advised) == sorted(read)


def resident(path):
    """Pages of a file that are in the system's memory; None where it does not tell."""
    mapped = np.memmap(path, np.uint8, "r")
    states = (ctypes.c_ubyte * -(-mapped.size // mmap.PAGESIZE))()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), states)
    return None if failed else sum(state & 1 for state in states)


def test_what_is_prefetched_is_in_memory_before_it_is_read(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored, path = Cache(artifact(tmp_path, **cache.facts)), tmp_path / "piece-00000.safetensors"
    stored.rows("s03")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) != 0:
        pytest.skip("this file system keeps everything in memory")
    stored.prefetch(list(stored.index))
    for _ in range(100):
        if resident(path) == -(-path.stat().st_size // mmap.PAGESIZE):
            return
        time.sleep(0.05)
    pytest.fail(f"{resident(path)} pages after 5 s")


def test_the_trainer_tells_sources_of_the_next_step_and_sees_the_same_steps(mix, tokenizer):
    corpus = Corpus([mix], tokenizer)
    spec = {"batch_size": 4, "seed": 3}
    told, seen = [], []

    class Listening:
        def prefetch(self, drawn):
            told.append([d.sample["id"] for d in drawn])

    for step, numbers in read_ahead(
        corpus.batches(spec, 2, 9), lambda numbers: [corpus.drawn[i] for i in numbers], [Listening(), Listening()]
    ):
        seen.append((step, numbers))
        following = min(len(seen), 6)
        assert len(told) == 2 * following  # of the step after this one, before this one begins
    assert seen == list(corpus.batches(spec, 2, 9))
    assert told[::2] == told[1::2] == [[corpus.drawn[i].sample["id"] for i in numbers] for _, numbers in seen[1:]]
