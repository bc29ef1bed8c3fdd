import copy

import pytest

from llmfusion.data.chat import closing_tokens, encode, prompt_ids, prompt_text, turn_headers
from llmfusion.errors import UserError
from tests.unit.stand_ins import question

ONE = question("1", "What is 2 plus 3?", "2 + 3 = 5")
MANY = question("2", "Hi", "Hello!", "How many?", "12 apples", "Bye", "Bye.")
END = "<|end|>"


@pytest.fixture
def bos_tokenizer(tokenizer):
    out = copy.deepcopy(tokenizer)
    out.add_special_tokens({"bos_token": "<|begin|>"})
    return out


def labels(encoded, tokenizer):
    return tokenizer.decode(encoded.label_ids)


def test_the_labels_are_the_response_and_its_end_token_and_nothing_else(tokenizer):
    encoded = encode(ONE, tokenizer, 99)
    assert labels(encoded, tokenizer) == "2 + 3 = 5" + END
    count = len(encoded.label_ids)
    assert encoded.is_label == [False] * (len(encoded.ids) - count) + [True] * count
    assert tokenizer.decode(encoded.ids[:-count]) == "User: What is 2 plus 3?\nAssistant:\n"
    assert encoded.label_ids[-1] == tokenizer.eos_token_id


def test_all_assistant_turns_of_a_conversation_are_labels(tokenizer):
    encoded = encode(MANY, tokenizer, 99)
    assert labels(encoded, tokenizer) == f"Hello!{END}12 apples{END}Bye.{END}"
    assert tokenizer.decode(encoded.ids) + "\n" == tokenizer.apply_chat_template(MANY["messages"], tokenize=False)


def test_a_shorter_conversation_is_a_prefix_of_the_longer(tokenizer):
    whole = encode(MANY, tokenizer, 99)
    for turns in (2, 4):
        part = encode({**MANY, "messages": MANY["messages"][:turns]}, tokenizer, 99)
        assert (part.ids, part.is_label) == (whole.ids[: len(part.ids)], whole.is_label[: len(part.ids)])


def test_a_question_is_asked_with_the_very_tokens_it_was_trained_with(tokenizer):
    encoded = encode(ONE, tokenizer, 99)
    prompt = tokenizer(prompt_text(ONE["messages"][:-1], tokenizer), add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)] == prompt
    assert not any(encoded.is_label[: len(prompt)])
    assert all(encoded.is_label[len(prompt) :])


def test_a_response_has_the_same_ids_behind_any_prompt_and_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token "
        "}}{% endif %}{% endfor %}"
    )
    response = "12 apples \n and  pens"
    label_ids = {
        tuple(encode(question("x", prompt, response), t, 99).label_ids)
        for prompt in ("a", "b 1", "c\n\n", " ")
        for t in (tokenizer, other)
    }
    assert len(label_ids) == 1


def test_exactly_the_maximal_length_is_kept_and_one_more_is_too_long(tokenizer):
    length = len(encode(ONE, tokenizer, 99).ids)
    assert len(encode(ONE, tokenizer, length).ids) == length
    assert encode(ONE, tokenizer, length - 1) == "too long"


def test_a_text_is_all_labels_but_its_first_token_which_nothing_predicts(tokenizer):
    encoded = encode({"text": "The dax is red."}, tokenizer, 99)
    assert tokenizer.decode(encoded.ids) == "The dax is red." + END
    assert encoded.is_label == [False] + [True] * (len(encoded.ids) - 1)


def test_an_empty_text_has_no_label(tokenizer):
    assert encode({"text": ""}, tokenizer, 99) == "no label"


def test_a_begin_token_comes_once_and_is_no_label(bos_tokenizer):
    begin = bos_tokenizer.bos_token_id
    for sample in (ONE, MANY, {"text": "The dax is red."}):
        encoded = encode(sample, bos_tokenizer, 99)
        assert encoded.ids[0] == begin
        assert encoded.ids.count(begin) == 1
        assert not encoded.is_label[0]
    assert all(encode({"text": "The dax is red."}, bos_tokenizer, 99).is_label[1:])


def test_a_pad_token_equal_to_the_end_token_takes_no_label_away(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert encode(ONE, other, 99) == encode(ONE, tokenizer, 99)


def test_a_template_that_counts_the_turns_loses_none(tokenizer):
    """The conversation is rendered once, whole: no part of it need be the beginning of another rendering."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}: {% for m in messages %}{{ m['content'] }} {% endfor %}"
    for sample in (ONE, MANY):
        assert encode(sample, other, 99).label_ids == encode(sample, tokenizer, 99).label_ids


@pytest.mark.parametrize(
    "content", ["{{ m['content'] | upper }}", "{{ m['content'] }}{{ m['content'] }}", "{{ m['content'][3:] }}", ""]
)
def test_a_template_that_changes_an_answer_is_named(tokenizer, content):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[" + content + "]{% endfor %}"
    assert encode(MANY, other, 99) == "template changes an answer"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "template refuses it"),
        ("\n{{ messages[9]['content'] }}", "template fails: UndefinedError, line 2"),
        ("{{ 1 / 0 }}", "template fails: ZeroDivisionError, line 1"),
    ],
)
def test_a_template_that_fails_is_named_with_its_line(tokenizer, template, reason):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    assert encode(MANY, other, 99) == prompt_ids(MANY["messages"][:-1], other) == reason


def test_a_template_that_never_ends_stops_everything_and_loses_no_sample_silently(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% if 'apples' in m.content %}{{ 'a' * 10**10 }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="the chat template, line 1: it does more work"):
        encode(MANY, other, 99)


@pytest.mark.parametrize("close", ["", "\n", " [end] "])
def test_where_a_template_closes_no_answer_the_end_token_does(tokenizer, close):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + close + "{% endfor %}"
    encoded = encode(MANY, other, 200)
    assert labels(encoded, tokenizer) == f"Hello!{END}12 apples{END}Bye.{END}"


def test_a_template_that_closes_only_earlier_answers_closes_the_last_one_alike(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    other.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\\n<|stop|>' }}{% endif %}{% endfor %}"
    )
    closed = "\n<|stop|>"
    encoded = encode(MANY, other, 99)
    assert other.decode(encoded.label_ids) == f"Hello!{closed}12 apples{closed}Bye.{closed}"
    assert closing_tokens(other) == [other.convert_tokens_to_ids("<|stop|>")]


def test_the_heads_of_the_neutral_templates_turns_end_an_answer(tokenizer):
    assert turn_headers(tokenizer) == ["\nUser:", "\nAssistant:"]


def test_of_several_templates_the_default_is_taken_and_another_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 1 }}"}
    assert encode(ONE, other, 99) == encode(ONE, tokenizer, 99)
    other.chat_template = {"tool_use": "{{ 1 }}"}
    with pytest.raises(UserError, match=r"\['tool_use'\], none is called 'default'"):
        encode(ONE, other, 99)


def test_a_special_token_written_out_in_a_text_or_an_answer_is_text(tokenizer):
    said = f"Write {END} at the end"
    for sample in ({"text": said}, question("x", said, said)):
        encoded = encode(sample, tokenizer, 99)
        assert list(encoded.ids).count(tokenizer.eos_token_id) == 1
        assert said in tokenizer.decode(encoded.ids)


def test_white_space_that_a_token_takes_behind_it_is_missing_in_the_prompt_as_in_the_whole_text(tokenizer):
    """The tokens of Phi 3 take the line break behind them: "<|end|>\\n" is one token."""
    from tokenizers import AddedToken

    other = copy.deepcopy(tokenizer)
    names = ("<|user|>", "<|assistant|>", "<|stop|>")
    other.add_special_tokens({"additional_special_tokens": [AddedToken(n, special=True, rstrip=True) for n in names]})
    other.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    encoded = encode(MANY, other, 99)
    expected = other.apply_chat_template(MANY["messages"], tokenize=True, return_dict=False)
    assert list(encoded.ids) == expected
