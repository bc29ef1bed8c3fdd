import pytest
import torch
from transformers import GenerationConfig

from llmfusion.data.chat import prompt_text
from llmfusion.data.samples import read_jsonl
from llmfusion.data.sources import Rejected
from llmfusion.errors import UserError
from llmfusion.models.loading import load_model, save_model
from llmfusion.steps import generate_answers as generate
from llmfusion.teachers.generation import answer_all
from tests.unit.stand_ins import job, question

LENGTH = 60


@pytest.fixture(scope="module")
def source(tied_teacher, tokenizer, tmp_path_factory):
    """A random model that now and then ends, and now and then says nothing."""
    from tests.unit.stand_ins import artifact

    model = load_model(tied_teacher, "float32")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 5
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Ċ")] *= 1.5
    folder = tmp_path_factory.mktemp("source")
    return artifact(folder, **save_model(model, tokenizer, folder, "float32"))


@pytest.fixture(scope="module")
def asked(samples):
    more = [
        question(f"m{i}", " ".join(["apple", "pen", "cup"][: i % 3 + 1]) + f" {i}" * (i % 5), "gold") for i in range(40)
    ]
    return [*(s for s in samples if "messages" in s), *more, question("long", "apples " * 60, "gold")]


@torch.no_grad()
def naive(model, tokenizer, sample):
    """One token at a time, the whole text again for each: the answer, or why there is none."""
    ids = tokenizer(prompt_text(sample["messages"][:-1], tokenizer), add_special_tokens=False)["input_ids"]
    if len(ids) >= LENGTH:
        return "too long", None
    said = []
    while len(ids) < LENGTH:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            text = tokenizer.decode(said, skip_special_tokens=True)
            return ("answered", text) if text.strip() else ("empty", None)
        said.append(ids[-1])
    return "unfinished", None


@pytest.fixture(scope="module")
def truth(source, tokenizer, asked):
    model = load_model(source, "float32")
    return {s["id"]: naive(model, tokenizer, s) for s in asked}


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_answers_are_greedy_and_what_is_dropped_is_counted_whatever_the_batch(
    source, tokenizer, asked, truth, batch_size
):
    outcomes = [outcome for outcome, _ in truth.values()]
    assert min(map(outcomes.count, ("answered", "unfinished", "empty", "too long"))) > 0  # the model shows every case
    rejected = Rejected()
    kept = answer_all(load_model(source, "float32"), tokenizer, asked, LENGTH, batch_size, rejected)
    expected = [s for s in asked if truth[s["id"]][0] == "answered"]
    assert [s["messages"][-1]["content"] for s in kept] == [truth[s["id"]][1] for s in expected]
    assert [s["messages"][:-1] for s in kept] == [s["messages"][:-1] for s in expected]
    assert rejected.counts == {name: outcomes.count(name) for name in ("unfinished", "empty", "too long")}


def test_settings_that_come_with_the_model_do_not_change_greedy_answers(source, tokenizer, asked, truth):
    model = load_model(source, "float32")
    model.generation_config = GenerationConfig(
        repetition_penalty=8.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[tokenizer.eos_token_id],
        do_sample=True,
        temperature=9.0,
    )
    kept = answer_all(model, tokenizer, asked, LENGTH, 16, Rejected())
    assert [s["messages"][-1]["content"] for s in kept] == [
        text for outcome, text in truth.values() if outcome == "answered"
    ]


def test_a_new_answer_is_a_new_sample(source, tokenizer, asked):
    kept = answer_all(load_model(source, "float32"), tokenizer, asked, LENGTH, 16, Rejected())
    assert len({s["id"] for s in kept}) == len(kept)
    assert not {s["id"] for s in kept} & {s["id"] for s in asked}


def test_the_step_answers_the_questions_of_a_mix_and_counts(tmp_path, source, mix, samples, tokenizer):
    spec = {"model": "base/source", "mix": "m", "generation": {"dtype": "float32", "batch_size": 8}}
    made = job(tmp_path, spec, {"models/base/source": source, "data/mix/m": mix})
    generate.build(made)
    kept = list(read_jsonl(made.folder / "samples.jsonl"))
    assert (made.facts["samples"], made.facts["asked"], made.facts["max_length"]) == (len(kept), len(samples) - 1, 128)
    assert len(kept) + sum(r["count"] for r in made.facts["rejected"].values()) == len(samples) - 1


def test_a_mix_without_questions_and_a_model_without_answers_are_refused(tmp_path, pivot, mix):
    from tests.unit.stand_ins import artifact

    spec = {"model": "base/p", "mix": "m", "generation": {"dtype": "float32"}}
    (tmp_path / "samples.jsonl").write_text('{"id": "1", "text": "raw"}\n')
    with pytest.raises(UserError, match="raw text only"):
        generate.build(
            job(tmp_path, spec, {"models/base/p": pivot, "data/mix/m": artifact(tmp_path, max_length=40)}, "a")
        )
    with pytest.raises(UserError, match=r"base/p gave no usable answer to \d+ prompts: .*too long"):
        generate.build(
            job(tmp_path, spec, {"models/base/p": pivot, "data/mix/m": artifact(mix.folder, max_length=2)}, "b")
        )
