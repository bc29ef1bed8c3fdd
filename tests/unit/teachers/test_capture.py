import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache import TeacherCache
from llmfusion.teachers.cache_format import CHUNK_SAMPLES
from llmfusion.teachers.capture import capture
from llmfusion.teachers.statistics import statistics
from tests.unit.stand_ins import artifact


def tensors_of(folder):
    return [load_file(path) for path in sorted(folder.glob("piece-*.safetensors"))]


def usable(samples, tokenizer, max_length=128):
    found = [(s, encode(s, tokenizer, max_length)) for s in samples]
    return [(s, e) for s, e in found if not isinstance(e, str)]


def test_cached_states_through_the_head_are_the_models_own_logits(
    cache, teacher, tied_cache, tied_teacher, samples, tokenizer
):
    for stored, source in ((TeacherCache(cache), teacher), (TeacherCache(tied_cache), tied_teacher)):
        model, (weight, bias) = load_model(source, "float32"), stored.head()
        assert bias is None
        for sample, encoded in usable(samples, tokenizer):
            with torch.no_grad():
                logits = model(torch.tensor([encoded.ids])).logits[0, label_positions(encoded)]
            torch.testing.assert_close(stored.rows(sample["id"])["hidden"] @ weight.T, logits, rtol=0, atol=1e-5)
    assert tied_cache.facts["logprob_gap"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_statistics_are_those_of_the_stored_states_by_brute_force(tmp_path, teacher, mix, dtype):
    facts = capture(teacher, mix, tmp_path, Capture(dtype=dtype), None)
    [rows], head = tensors_of(tmp_path), load_file(tmp_path / "head.safetensors")["weight"]
    assert rows["hidden"].dtype == getattr(torch, dtype)
    logits = rows["hidden"].double().numpy() @ head.double().numpy().T  # (n, V)
    total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    log_q = logits - total[:, None]
    expected = {
        "logsumexp": total,
        "entropy": -(np.exp(log_q) * log_q).sum(1),
        "label_logprob": log_q[np.arange(len(log_q)), rows["label_id"].numpy()],
    }
    for name, values in expected.items():
        assert rows[name].dtype == torch.float32
        np.testing.assert_allclose(rows[name].numpy(), values, rtol=0, atol=1e-5)
    assert rows["entropy"].min() >= 0
    assert rows["label_logprob"].max() <= 0
    assert facts["rows"] == len(total)


def test_a_confident_teacher_has_no_negative_entropy_or_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator) * 9
    hidden = torch.randn(2000, 16, generator=generator) * 3
    labels = (hidden @ weight.T).argmax(1)
    found = statistics(hidden, weight, None, labels, 300)
    assert found["label_logprob"].max() <= 0  # a weight 1 / (H + CE + eps) must never turn negative
    assert found["entropy"].min() >= 0


def test_statistics_do_not_depend_on_chunks_and_leave_out_unknown_rows():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(50, 8, generator=generator),
        torch.randn(20, 8, generator=generator),
        torch.randn(20, generator=generator),
    )
    labels = torch.arange(50) % 15
    whole, parts = (statistics(hidden, weight, bias, labels, 15, chunk) for chunk in (512, 7))
    log_q = (hidden.double() @ weight[:15].double().T + bias[:15]).log_softmax(-1)
    torch.testing.assert_close(whole["entropy"].double(), -(log_q.exp() * log_q).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole["label_logprob"].double(), log_q[torch.arange(50), labels], rtol=0, atol=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=1e-6)


def test_every_sample_has_its_rows_in_the_order_of_its_labels(cache, samples, tokenizer):
    stored = TeacherCache(cache)
    expected = usable(samples, tokenizer)
    assert list(stored.index) == [s["id"] for s, _ in expected]
    for sample, encoded in expected:
        assert stored.rows(sample["id"])["label_id"].tolist() == encoded.label_ids
    twice = stored.index["twice"]
    texts = [
        tokenizer(m["content"], add_special_tokens=False)["input_ids"]
        for s in samples
        if s["id"] == "twice"
        for m in s["messages"][1::2]
    ]
    assert twice["segment_starts"] == [0, len(texts[0]) + 1, len(texts[0]) + len(texts[1]) + 2]
    assert [tokenizer.decode([i]) for i in twice["segment_prompts"]] == ["\n"] * 3


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_row_takes_its_state_and_sixteen_bytes(tmp_path, teacher, mix, dtype, size):
    facts = capture(teacher, mix, tmp_path, Capture(dtype=dtype), None)
    total = sum(t.numel() * t.element_size() for chunk in tensors_of(tmp_path) for t in chunk.values())
    assert total == facts["rows"] * (24 * size + 16)


def test_the_three_spreads_are_standard_deviations_over_all_label_rows(cache, samples, tokenizer, teacher):
    embedding = load_model(teacher, "float32").get_input_embeddings().weight.detach().double().numpy()
    inputs, labels = [], []
    for _, encoded in usable(samples, tokenizer):
        inputs += [encoded.ids[i] for i in label_positions(encoded)]
        labels += encoded.label_ids
    hidden = np.concatenate([chunk["hidden"].double().numpy() for chunk in tensors_of(cache.folder)])
    assert cache.facts["std_hidden"] == pytest.approx(hidden.std(), rel=1e-9)
    assert cache.facts["std_target_embedding"] == pytest.approx(embedding[labels].std(), rel=1e-9)
    assert cache.facts["std_index_embedding"] == pytest.approx(embedding[[*inputs, *labels]].std(), rel=1e-9)


def test_a_second_capture_gives_identical_bytes(tmp_path, cache, teacher, mix):
    capture(teacher, mix, tmp_path, Capture(dtype="float32", batch_size=7), None)
    names = {p.name for p in cache.folder.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert all((tmp_path / name).read_bytes() == (cache.folder / name).read_bytes() for name in names)


def test_chunks_hold_the_rows_of_consecutive_samples(tmp_path, cache, teacher, mix, samples, monkeypatch):
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 8)
    facts = capture(teacher, mix, tmp_path, Capture(dtype="float32", batch_size=7), None)
    small, whole = TeacherCache(artifact(tmp_path, **facts)), TeacherCache(cache)
    assert len(tensors_of(tmp_path)) == 4 == -(-len(samples) // 8)
    for number, sample in enumerate(samples):
        assert small.entry(sample["id"])["piece"] == number // 8
        for name, values in whole.rows(sample["id"]).items():  # other samples shared its forward pass
            torch.testing.assert_close(small.rows(sample["id"])[name], values, rtol=1e-5, atol=1e-5)


def test_the_head_and_embedding_lie_beside_the_states_unless_tied(cache, teacher, tied_cache):
    stored, model = load_file(cache.folder / "head.safetensors"), load_file(teacher.folder / "model.safetensors")
    assert set(stored) == {"weight", "embedding"}
    assert torch.equal(stored["weight"], model["lm_head.weight"])
    assert torch.equal(stored["embedding"], model["model.embed_tokens.weight"])
    assert set(load_file(tied_cache.folder / "head.safetensors")) == {"weight"}


def test_samples_too_long_for_the_teacher_are_left_out_counted_and_asked_for_in_vain(
    tmp_path, teacher, mix, samples, tokenizer
):
    short = artifact(mix.folder, max_length=40, samples=len(samples))
    facts = capture(teacher, short, tmp_path, Capture(dtype="float32"), None)
    kept = {s["id"] for s, _ in usable(samples, tokenizer, 40)}
    assert set(pyarrow.parquet.read_table(tmp_path / "index.parquet")["id"].to_pylist()) == kept
    assert facts["rejected"]["too long"]["count"] == len(samples) - len(kept) > 0
    with pytest.raises(UserError, match=r"no rows for sample twice; .*tokenizers"):
        TeacherCache(artifact(tmp_path, **facts)).rows("twice")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no sample of the mix fits"):
        capture(
            teacher,
            artifact(mix.folder, max_length=3, samples=len(samples)),
            tmp_path / "none",
            Capture(dtype="float32"),
            None,
        )


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_that_are_more_than_states_times_a_head_are_refused_by_name(tmp_path, teacher, mix, name):
    folder = shutil.copytree(teacher.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: 30.0}))
    with pytest.raises(UserError, match=name):
        capture(artifact(folder), mix, tmp_path, Capture(dtype="float32"), None)
