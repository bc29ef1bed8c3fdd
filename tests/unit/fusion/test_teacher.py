import copy
from itertools import pairwise

import pytest
import torch

from llmfusion.data.chat import encode
from llmfusion.errors import UserError
from llmfusion.fusion.distributions import HiddenStateDistribution, TeacherHead
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.teacher import CachedTeacher
from llmfusion.io.jsonl import write_jsonl
from llmfusion.models.batches import label_positions
from llmfusion.models.loading import load_model, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.study.schema.base_models import Architecture, Tokenizer
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.capture import capture
from tests.unit.stand_ins import artifact, question

IDS = ["s03", "twice", "c02", "raw"]


def named(ids):
    """What a cache of stored states needs of samples."""
    return [{"id": i} for i in ids]


def encoded_of(samples, tokenizer, ids=IDS):
    by_id = {s["id"]: s for s in samples}
    return [encode(by_id[i], tokenizer, 128) for i in ids]


@torch.no_grad()
def states(model, encoded):
    return torch.cat(
        [model.base_model(torch.tensor([e.ids])).last_hidden_state[0, label_positions(e)] for e in encoded]
    )


@torch.no_grad()
def logits(model, encoded):
    return torch.cat([model(torch.tensor([e.ids])).logits[0, label_positions(e)] for e in encoded])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_from_the_cache_is_kd_from_the_model(cache, teacher, pivot, tokenizer, samples, temperature):
    encoded = encoded_of(samples, tokenizer)
    labels = [e.label_ids for e in encoded]
    rows = CachedTeacher("t", cache, tokenizer, 300, "cpu").distribution(named(IDS), labels)
    student, own = load_model(pivot, "float32"), load_model(teacher, "float32")
    flat = torch.tensor([y for sample in labels for y in sample])
    found = fused_loss(
        states(student, encoded), student.lm_head.weight, None, flat, [rows], torch.ones(len(flat), 1), 1.0, temperature
    )
    log_q, log_p = ((logits(m, encoded).double() / temperature).log_softmax(-1) for m in (own, student))
    assert found.loss.item() / len(flat) == pytest.approx(
        float((log_q.exp() * (log_q - log_p)).sum()) / len(flat), abs=1e-5
    )
    plain = logits(own, encoded).double().log_softmax(-1)
    torch.testing.assert_close(rows.entropy.double(), -(plain.exp() * plain).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.cross_entropy.double(), -plain[torch.arange(len(flat)), flat], rtol=0, atol=1e-5)
    assert rows.mask.tolist() == [1.0] * len(flat)


def test_rows_follow_the_order_of_the_samples_asked_for(cache, tokenizer, samples):
    cached = CachedTeacher("t", cache, tokenizer, 300, "cpu")
    one = [
        cached.distribution(named([i]), [e.label_ids]) for i, e in zip(IDS, encoded_of(samples, tokenizer), strict=True)
    ]
    order = [2, 0, 3, 1]
    together = cached.distribution(
        named([IDS[i] for i in order]), [encoded_of(samples, tokenizer)[i].label_ids for i in order]
    )
    whole = together.log_probs(slice(0, 9999), 1.0)
    torch.testing.assert_close(whole, torch.cat([one[i].log_probs(slice(0, 9999), 1.0) for i in order]))
    torch.testing.assert_close(together.log_probs(slice(3, 8), 1.0), whole[3:8])
    torch.testing.assert_close(together.entropy, torch.cat([one[i].entropy for i in order]))


@pytest.fixture(scope="module")
def added(tmp_path_factory, tokenizer, samples):
    """A teacher whose added tokens and end token are not the student's.

    The cache of two samples, the model, both tokenizers.
    """
    folder = tmp_path_factory.mktemp("added")
    theirs, ours = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    theirs.add_special_tokens(
        {"additional_special_tokens": ["<|same|>", "<|theirs|>"], "eos_token": "<|stop|>"}
    )  # ids 300, 301, 302 in some order
    ours.add_special_tokens(
        {
            "additional_special_tokens": [
                t if t == "<|same|>" else "<|ours|>" for t in theirs.convert_ids_to_tokens([300, 301])
            ]
        }
    )
    assert theirs.convert_tokens_to_ids("<|same|>") == ours.convert_tokens_to_ids("<|same|>") >= 300
    shape = Architecture(
        model_type="llama",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    model = make_model(shape, theirs, 4)
    write_jsonl(folder / "samples.jsonl", [s for s in samples if s["id"] in ("s03", "twice")])
    save_model(model, theirs, folder / "model", "float32")
    facts = capture(
        artifact(folder / "model"),
        artifact(folder, max_length=128, samples=2),
        folder / "model",
        Capture(dtype="float32"),
        None,
    )
    return artifact(folder / "model", **facts), model.eval(), theirs, ours


def test_tokens_that_differ_are_masked_out_of_the_teachers_softmax(added, samples):
    cache, model, theirs, ours = added
    ids = ["s03", "twice"]
    student, own = encoded_of(samples, ours, ids), encoded_of(samples, theirs, ids)
    cached = CachedTeacher("t", cache, ours, 310, "cpu")
    rows = cached.distribution(named(ids), [e.label_ids for e in student])
    shared = [i for token, i in theirs.get_vocab().items() if ours.get_vocab().get(token) == i]
    assert len(shared) == 301
    expected = torch.full((len(rows.mask), 310), -torch.inf, dtype=torch.float64)
    for row, z in enumerate(logits(model, own).double()):
        total = sum(z[i].exp() for i in shared)
        for i in shared:
            expected[row, i] = z[i] - total.log()
    found = rows.log_probs(slice(0, len(expected)), 1.0).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    entropy = -(expected.exp() * expected.masked_fill(expected.isinf(), 0)).sum(1)
    torch.testing.assert_close(rows.entropy.double(), entropy, rtol=0, atol=1e-5)


def test_where_end_tokens_differ_the_closing_position_carries_no_teacher(added, samples):
    cache, _, _, ours = added
    labels = [e.label_ids for e in encoded_of(samples, ours, ["s03", "twice"])]
    rows = CachedTeacher("t", cache, ours, 310, "cpu").distribution(named(["s03", "twice"]), labels)
    closing = [token == ours.eos_token_id for sample in labels for token in sample]
    assert sum(closing) == 4
    assert rows.mask.tolist() == [float(not end) for end in closing]
    assert torch.isfinite(rows.cross_entropy).all()


CLOSINGS = {
    "another token": "<|pad|>",
    "the same token behind a space": " <|end|>",
    "another token behind two spaces": "  <|pad|>",
    "none, so the end token": "",
}


@pytest.mark.parametrize("closing", CLOSINGS.values(), ids=CLOSINGS)
def test_a_teacher_whose_template_closes_otherwise_carries_nothing_there_and_its_own_rows_elsewhere(
    tmp_path, teacher, tokenizer, samples, closing
):
    """The rows of its responses stand at other places of its cache, where its closings are longer or shorter."""
    theirs = copy.deepcopy(tokenizer)
    theirs.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + closing + "{% endfor %}"
    model = load_model(teacher, "float32")
    save_model(model, theirs, tmp_path / "model", "float32")
    write_jsonl(tmp_path / "samples.jsonl", samples)
    mix = artifact(tmp_path, max_length=256, samples=len(samples))
    facts = capture(artifact(tmp_path / "model"), mix, tmp_path / "model", Capture(dtype="float32"), None)
    cached = CachedTeacher("t", artifact(tmp_path / "model", **facts), tokenizer, 300, "cpu")
    by_id = {s["id"]: s for s in samples}
    student = [encode(by_id[i], tokenizer, 256) for i in IDS]
    rows = cached.distribution(named(IDS), [e.label_ids for e in student])
    place = 0
    for i, ours in zip(IDS, student, strict=True):
        segments = [*ours.segments()[0], len(ours.label_ids)]
        own = states(model, [encode(by_id[i], theirs, 256)])
        extra = len(tokenizer(closing, add_special_tokens=False)["input_ids"]) - 1 if closing and i != "raw" else 0
        for number, (start, stop) in enumerate(pairwise(segments)):
            response = slice(place + start, place + stop - 1)
            first = start + number * extra
            torch.testing.assert_close(rows.hidden[response], own[first : first + stop - start - 1])
            assert rows.mask[response].tolist() == [1.0] * (stop - start - 1)
            assert rows.mask[place + stop - 1] == float(closing == "" or i == "raw")
        place += segments[-1]
    assert place == len(rows.mask)


def test_a_teacher_with_another_vocabulary_is_refused_with_both_sizes(cache, mix):
    other = make_tokenizer(Tokenizer(vocabulary_size=290), mix.file("samples.jsonl"), None)
    with pytest.raises(UserError, match=r"teacher t has another vocabulary than the student \(300 and 290 tokens"):
        CachedTeacher("t", cache, other, 290, "cpu")


def test_a_sample_the_cache_lacks_or_labels_otherwise_is_named(cache, tokenizer, samples):
    cached = CachedTeacher("t", cache, tokenizer, 300, "cpu")
    with pytest.raises(UserError, match="no rows for sample missing"):
        cached.distribution(named(["missing"]), [[1]])
    labels = encoded_of(samples, tokenizer, ["s03"])[0].label_ids
    for wrong in (
        [*labels[:2], (labels[2] + 1) % 300, *labels[3:]],
        labels[:-1],
        [*labels, labels[-1]],
        encode(question("x", "a", "b"), tokenizer, 99).label_ids,
    ):
        with pytest.raises(UserError, match="teacher t: sample s03: its cached labels are not the student's"):
            cached.distribution(named(["s03"]), [wrong])


@pytest.mark.parametrize("known", [5, 8, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_are_a_softmax_over_the_shared_tokens_whatever_the_teacher_has_more_or_less(known, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 3), (known, 3), (known,)))
    shared = torch.tensor([0, 2, 3, 4])
    nothing = torch.zeros(7)
    rows = HiddenStateDistribution(hidden, TeacherHead(head, bias, shared, 8), nothing, nothing, nothing)
    expected = torch.full((7, 8), -torch.inf)
    expected[:, shared] = ((hidden @ head.T + bias)[:, shared] / temperature).log_softmax(-1)
    torch.testing.assert_close(rows.log_probs(slice(0, 7), temperature), expected)
    torch.testing.assert_close(rows.log_probs(torch.tensor([6, 1]), temperature), expected[[6, 1]])
