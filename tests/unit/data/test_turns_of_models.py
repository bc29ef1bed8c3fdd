"""Turns in the true templates of 36 models, by properties over conversations and tokenizers."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfusion.data.chat import chat_format, closing_tokens, encode, prompt_ids, prompt_text
from llmfusion.data.turns import TurnsError
from llmfusion.io.templates import TODAY
from tests.unit.data.chat_models import (
    KEEP_NO_SYSTEM,
    NAMES,
    SOURCES,
    THINKING,
    WITHOUT_SYSTEM,
    byte_level,
    sentencepiece,
    source,
)

WORDS = [
    *(
        "a",
        "the",
        "Hi",
        "12",
        "x = 1",
        "def f():\n\n    return 1\n",
        "café",
        "e\u0301",
        "漢字",
        "🙂👩\u200d🔬",
        "  ",
        "\n",
        "\n\n",
        "\t",
    ),
    *("User:", "User: a", "Assistant:", "\nAssistant:\n", "### Response:", "[/INST]", "<<SYS>>", "system", "user"),
    *("{{ 1 }}", "{% if a %}", "{# a #}", "<", "|>", "&amp;", "\\n", "xq0y0z", "xq0y", "\u2028", "\u00a0", "\r\n"),
]
SPECIAL = sorted({token for facts in SOURCES.values() for token in [facts["eos_token"], *facts["tokens"]]})
WITH_TOKENS = [*WORDS, *SPECIAL]
PLAIN = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def contents(words):
    return st.lists(st.sampled_from(words), min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())


@st.composite
def conversations(draw, words=WORDS):
    """Up to four rounds, with a system turn or without; contents are often equal to, or part of, one another."""
    system = draw(st.none() | contents(words))
    turns = draw(st.lists(contents(words), min_size=2, max_size=8).filter(lambda turns: len(turns) % 2 == 0))
    if draw(st.booleans()):
        turns[-1] = turns[0]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *messages]


def has_system(messages):
    return messages[0]["role"] == "system"


def refuses(name, messages):
    return name in WITHOUT_SYSTEM and has_system(messages)


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


def behind_the_last(name):
    """What a template prints behind the closing of a conversation: a line break, or the head of another turn."""
    printed = chat_format(byte_level(name)).frames[-1]
    return printed.removeprefix(source(name)["closing"])


@pytest.fixture(autouse=True, scope="module")
def _transformers_has_the_same_date():
    class Clock:
        now = staticmethod(lambda: TODAY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        yield


@PLAIN
@given(name=st.sampled_from(NAMES), messages=conversations(WITH_TOKENS))
def test_prompts_answers_and_closings_are_the_rendering_of_transformers(name, messages):
    tokenizer = byte_level(name)
    if refuses(name, messages):
        with pytest.raises(TurnsError, match="template refuses it"):
            chat_format(tokenizer).turns(messages)
        return
    turns = chat_format(tokenizer).turns(messages)
    text = rendered(tokenizer, messages)
    assert chat_format(tokenizer).render(messages) == text
    whole = "".join(t.prompt + t.response + (t.closing.text if t.is_closed else "") for t in turns)
    assert whole + behind_the_last(name) == text
    assert len(turns) == len(answers(messages))
    for turn, content in zip(turns, answers(messages), strict=True):
        assert turn.response.strip() == content.strip()
        assert turn.response in content
        assert turn.closing.text == source(name)["closing"]


@PLAIN
@given(name=st.sampled_from(NAMES), messages=conversations())
def test_the_text_of_labels_and_between_them_is_what_the_template_prints(name, messages):
    tokenizer = byte_level(name)
    encoded = encode({"messages": messages}, tokenizer, 10**6)
    if refuses(name, messages):
        assert encoded == "template refuses it"
        return
    turns = chat_format(tokenizer).turns(messages)
    runs = runs_of(encoded)
    assert [tokenizer.decode(ids) for ids, label in runs if label] == [t.response + t.closing.text for t in turns]
    assert [tokenizer.decode(ids) for ids, label in runs if not label] == [t.prompt for t in turns]
    assert len(encoded.segments()[0]) == len(turns)
    if all(turn.is_closed for turn in turns):
        assert tokenizer.decode(encoded.ids) + behind_the_last(name) == rendered(tokenizer, messages)


def runs_of(encoded):
    """Runs of labels and of prompts, as ids."""
    runs = []
    for token, label in zip(encoded.ids, encoded.is_label, strict=True):
        if not runs or runs[-1][1] != bool(label):
            runs.append(([], bool(label)))
        runs[-1][0].append(token)
    return runs


@PLAIN
@given(
    make=st.sampled_from([byte_level, sentencepiece]), name=st.sampled_from(NAMES), messages=conversations(WITH_TOKENS)
)
def test_a_question_is_asked_with_the_ids_before_its_answer_in_training(make, name, messages):
    tokenizer = make(name)
    encoded = encode({"messages": messages}, tokenizer, 10**6)
    asked = prompt_ids(messages[:-1], tokenizer)
    if isinstance(encoded, str):
        assert encoded == asked == "template refuses it"
        return
    last = encoded.segments()[0][-1]
    labels = [i for i, label in enumerate(encoded.is_label) if label]
    assert asked == list(encoded.ids[: labels[last]])


@PLAIN
@given(
    make=st.sampled_from([byte_level, sentencepiece]), name=st.sampled_from(NAMES), messages=conversations(WITH_TOKENS)
)
def test_a_token_that_somebody_writes_out_is_ordinary_text(make, name, messages):
    """The special tokens of a sample are those of the same conversation in plain words."""
    tokenizer = make(name)
    encoded = encode({"messages": messages}, tokenizer, 10**6)
    if isinstance(encoded, str):
        return
    plain = [{**message, "content": "plain"} for message in messages]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    expected = encode({"messages": plain}, tokenizer, 10**6)
    assert [i for i in encoded.ids if i in special] == [i for i in expected.ids if i in special]


@PLAIN
@given(name=st.sampled_from(NAMES), messages=conversations())
def test_prompts_have_the_ids_that_transformers_gives_them_and_the_begin_token_comes_once(name, messages):
    tokenizer = byte_level(name)
    encoded = encode({"messages": messages[:2] if not has_system(messages) else messages[:3]}, tokenizer, 10**6)
    if isinstance(encoded, str):
        return
    text = rendered(tokenizer, messages[: 3 if has_system(messages) else 2])
    prompt = [i for i, label in zip(encoded.ids, encoded.is_label, strict=True) if not label]
    assert prompt == tokenizer(text[: len(tokenizer.decode(prompt))], add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token and tokenizer.bos_token not in (tokenizer.eos_token, "<|im_start|>"):
        printed = tokenizer.apply_chat_template(messages[:1], return_dict=False).count(tokenizer.bos_token_id)
        assert encoded.ids.count(tokenizer.bos_token_id) == printed or name == "alphamonarch"
        assert printed <= 1


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@PLAIN
@given(messages=conversations(WITH_TOKENS))
def test_an_answer_without_white_space_at_its_edges_has_the_same_ids_in_every_template(make, messages):
    """Of tokenizers with the same base vocabulary; special tokens that one of them has are text for all."""
    messages = [{**m, "content": m["content"].strip()} for m in messages if m["role"] != "system"]
    found = {}
    for name in NAMES:
        tokenizer = make(name)
        encoded = encode({"messages": messages}, tokenizer, 10**6)
        closing = len(chat_format(tokenizer).closings[0].ids)
        found[name] = [tuple(ids[:-closing]) for ids, label in runs_of(encoded) if label]
    assert len(set(map(tuple, found.values()))) == 1


def test_sentencepiece_writes_an_answer_behind_its_prompt_as_in_the_whole_text():
    """Where a prompt ends with a space, the answer's first token writes it; a second one would be no text at all."""
    for name in ("llama-2-chat-vigogne", "vicuna", "mistral-v1"):
        tokenizer = sentencepiece(name)
        messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "there: a"}]
        text = rendered(tokenizer, messages)
        encoded = encode({"messages": messages}, tokenizer, 999)
        native = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(encoded.ids) == native[: len(encoded.ids)]
        assert tokenizer.decode(encoded.label_ids) == "there: a" + source(name)["closing"]


def test_deepseeks_answers_stand_behind_a_space_in_training_and_when_asked():
    """Its prompts end with "Assistant:", its history has "Assistant: text": every conversation was refused."""
    tokenizer = byte_level("deepseek-v2")
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    encoded = encode({"messages": turns}, tokenizer, 99)
    end = tokenizer.eos_token
    expected = f"{tokenizer.bos_token}User: a\n\nAssistant: b{end}User: c\n\nAssistant: d{end}"
    assert tokenizer.decode(encoded.ids) == expected
    assert tokenizer.decode(encoded.label_ids) == f"b{end}d{end}"
    assert prompt_text(turns[:3], tokenizer) == expected.removesuffix(f"d{end}")


def test_a_trimming_template_keeps_answers_with_white_space_at_their_edges():
    tokenizer = byte_level("llama-3.1-instruct")
    messages = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "\n\n b c \n"}]
    encoded = encode({"messages": messages}, tokenizer, 999)
    assert tokenizer.decode(encoded.label_ids) == "b c<|eot_id|>"


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_a_template_leaves_out_of_the_history_lose_the_sample_and_others_do_not(name):
    tokenizer = byte_level(name)
    thought = "<think>\nhm\n</think>\n\nyes"
    question = {"role": "user", "content": "a"}
    earlier = [question, {"role": "assistant", "content": thought}, question, {"role": "assistant", "content": "b"}]
    assert encode({"messages": earlier}, tokenizer, 999) == "template changes an answer"
    encoded = encode({"messages": [*earlier[2:], *earlier[:2]]}, tokenizer, 999)
    if name == "qwen3":  # prints the last answer's thoughts
        assert tokenizer.decode(encoded.label_ids) == f"b<|im_end|>{thought}<|im_end|>"
    else:
        assert encoded == "template changes an answer"


def test_an_answer_like_everything_around_it_is_found_in_its_place():
    rng = random.Random(1)
    for name in NAMES:
        tokenizer = byte_level(name)
        header = chat_format(tokenizer).frames[1]
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        plain = header
        for token in tokens:
            plain = plain.replace(token, "")
        for text in (plain.strip() or "a", "a", "c", "b", "d", "user", "assistant", *rng.sample(WORDS, 3)):
            if not text.strip() or ("</think>" in text and name in THINKING):
                continue
            messages = [{"role": r, "content": text} for r in ["user", "assistant"] * 3]
            encoded = encode({"messages": messages}, tokenizer, 10**6)
            assert not isinstance(encoded, str), (name, text, encoded)
            closing = source(name)["closing"]
            found = [tokenizer.decode(ids).removesuffix(closing) for ids, label in runs_of(encoded) if label]
            assert [answer.strip() for answer in found] == [text.strip()] * 3


@pytest.mark.parametrize("name", NAMES)
def test_generation_stops_at_the_templates_own_token(name):
    tokenizer = byte_level(name)
    closing = source(name)["closing"].strip()
    assert tokenizer.convert_tokens_to_ids(closing) in closing_tokens(tokenizer)
    assert all(tokenizer.added_tokens_decoder[i].special for i in closing_tokens(tokenizer))


@pytest.mark.parametrize("name", [*WITHOUT_SYSTEM, *KEEP_NO_SYSTEM])
def test_a_system_turn_is_refused_or_left_out_as_the_template_does(name):
    tokenizer = byte_level(name)
    messages = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "a"), ("assistant", "b"))]
    encoded = encode({"messages": messages}, tokenizer, 999)
    if name in WITHOUT_SYSTEM:
        assert encoded == "template refuses it"
    else:
        assert "brief" not in tokenizer.decode(encoded.ids)
