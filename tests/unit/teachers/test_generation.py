import copy

import pytest
import torch
from transformers import GenerationConfig

from llmfusion.data.chat import prompt_text
from llmfusion.data.rejections import Rejected
from llmfusion.models.loading import load_model, save_model
from llmfusion.teachers.generation import answer_all
from tests.unit.stand_ins import artifact, question

LENGTH = 60


@pytest.fixture(scope="module")
def source(tied_teacher, tokenizer, tmp_path_factory):
    """A random model whose answers sometimes end and are sometimes empty."""
    model = load_model(tied_teacher, "float32")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 5
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Ċ")] *= 1.5
    folder = tmp_path_factory.mktemp("source")
    return artifact(folder, **save_model(model, tokenizer, folder, "float32"))


@pytest.fixture(scope="module")
def questions(samples):
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
    answer = []
    while len(ids) < LENGTH:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            text = tokenizer.decode(answer, skip_special_tokens=True)
            return ("answered", text) if text.strip() else ("empty", None)
        answer.append(ids[-1])
    return "unfinished", None


@pytest.fixture(scope="module")
def truth(source, tokenizer, questions):
    model = load_model(source, "float32")
    return {s["id"]: naive(model, tokenizer, s) for s in questions}


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_answers_are_greedy_and_what_is_dropped_is_counted_whatever_the_batch(
    source, tokenizer, questions, truth, batch_size
):
    outcomes = [outcome for outcome, _ in truth.values()]
    assert min(map(outcomes.count, ("answered", "unfinished", "empty", "too long"))) > 0  # the model shows every case
    rejected = Rejected()
    kept = answer_all(load_model(source, "float32"), tokenizer, questions, LENGTH, batch_size, rejected)
    expected = [s for s in questions if truth[s["id"]][0] == "answered"]
    assert [s["messages"][-1]["content"] for s in kept] == [truth[s["id"]][1] for s in expected]
    assert [s["messages"][:-1] for s in kept] == [s["messages"][:-1] for s in expected]
    assert rejected.counts == {name: outcomes.count(name) for name in ("unfinished", "empty", "too long")}


def test_an_answer_ends_at_the_templates_own_token_and_a_refused_question_is_counted(
    source, tokenizer, questions, truth
):
    """The same model with a template that closes answers with a token other than the end token, behind a line break."""
    other = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    other.eos_token = "<|pad|>"
    other.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n{% else %}Assistant:\n"
        "{{ m['content'] }}" + end + "{{ '\n' }}{% endif %}{% endfor %}"
    )
    rejected = Rejected()
    kept = answer_all(load_model(source, "float32"), other, questions, LENGTH, 16, rejected)
    asked = [s for s in questions if s["messages"][0]["role"] == "user"]
    expected = [text for s in asked for outcome, text in [truth[s["id"]]] if outcome == "answered"]
    assert [s["messages"][-1]["content"] for s in kept] == expected
    assert rejected.counts["template refuses it"] == len(questions) - len(asked) == 1


def test_settings_that_come_with_the_model_do_not_change_greedy_answers(source, tokenizer, questions, truth):
    model = load_model(source, "float32")
    model.generation_config = GenerationConfig(
        repetition_penalty=8.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[tokenizer.eos_token_id],
        do_sample=True,
        temperature=9.0,
    )
    kept = answer_all(model, tokenizer, questions, LENGTH, 16, Rejected())
    assert [s["messages"][-1]["content"] for s in kept] == [
        text for outcome, text in truth.values() if outcome == "answered"
    ]


def test_a_new_answer_is_a_new_sample(source, tokenizer, questions):
    kept = answer_all(load_model(source, "float32"), tokenizer, questions, LENGTH, 16, Rejected())
    assert len({s["id"] for s in kept}) == len(kept)
    assert not {s["id"] for s in kept} & {s["id"] for s in questions}
