"""What hashes cannot see in samples, items, answers and scores: lines that cannot be used, under an honest manifest."""

import re
from typing import Any

import pytest

from llmfusion.artifacts import store
from llmfusion.errors import DamagedError
from llmfusion.study.schema.data import TaskPrompt
from tests.e2e.damage.finished import (
    ACCEPTED,
    CODE,
    GENERATED,
    MERGED,
    MIX,
    RESULTS,
    SHARD,
    Make,
    manifest_path,
    remake,
)
from tests.e2e.damage.spoil import Bytes, half_a_line, line, lost, rewrite, row

NO_JSON = "expected a JSON object in UTF-8"
NAN = float("nan")
SAMPLES: dict[str, tuple[Bytes, str]] = {
    "half a line": (half_a_line, NO_JSON),
    "a hole": (lambda c: bytes(len(c) - 1) + b"\n", NO_JSON),
    "no UTF-8": (lambda c: c.replace(b'"role"', b'"r\xffle"'), f"{NO_JSON}: 'utf-8' codec can't decode byte 0xff"),
    "half a surrogate pair": (
        lambda c: c.replace(b'"content": "', b'"content": "\\ud83d'),
        "content: expected text, found half a surrogate pair",
    ),
    "a NaN": (row(lambda r: r.update(weight=NAN)), f"{NO_JSON}: NaN is no number of JSON"),
    "a list": (lambda c: b"[1]\n", "expected an object, found list"),
    "an empty line": (lambda c: b"\n", NO_JSON),
    "no id": (row(lambda r: r.pop("id")), "id: expected text, found None"),
    "no messages": (row(lambda r: r.pop("messages")), "expected text or a list of messages, found None"),
    "empty messages": (row(lambda r: r.update(messages=[])), r"expected text or a list of messages, found \[\]"),
    "null text": (row(lambda r: r["messages"][1].update(content=None)), "content: expected text, found None"),
    "no role": (row(lambda r: r["messages"][0].pop("role")), "role: expected text, found None"),
    "a question alone": (row(lambda r: r["messages"].pop()), "expected the last message to be the assistant's"),
    "null raw text": (row(lambda r: r.update(text=None)), "text: expected text, found None"),
}
READERS = {"data/dataset/chat-code": "data/mix/code", MIX: "models/trained/sft", GENERATED: "models/trained/seqkd-code"}


@pytest.mark.parametrize("address", READERS)
@pytest.mark.parametrize("case", SAMPLES)
def test_a_sample_that_cannot_be_used_is_refused_by_file_and_line(
    message_of_step: Make, case: str, address: str
) -> None:
    spoil, message = SAMPLES[case]
    remake(address, rewrite("samples.jsonl", line(5, spoil)))
    assert re.match(rf"results/{address}/samples\.jsonl, line 5: {message}", message_of_step(READERS[address]))


@pytest.mark.parametrize("user", [SHARD, GENERATED, CODE])
def test_every_step_that_takes_a_mix_refuses_a_broken_line_in_it(message_of_step: Make, user: str) -> None:
    mix = "data/mix/code" if user == CODE else MIX
    remake(mix, rewrite("samples.jsonl", line(150, half_a_line)))
    assert re.match(rf"results/{mix}/samples\.jsonl, line 150: expected a JSON object", message_of_step(user))


# who else refuses a line: what is spoilt, its file and line, how, which step reads it, and what it says
LINES: dict[str, tuple[str, str, int, Bytes, str, str]] = {
    "a dataset without domains is not mixed": (
        "data/dataset/chat-code",
        "samples.jsonl",
        9,
        row(lambda r: r.pop("domain")),
        "data/mix/code",
        "domain: expected text, found None",
    ),
    "no model is asked a broken item": (
        "data/tasks/humaneval",
        "items.jsonl",
        24,
        row(lambda r: r.pop("entry_point")),
        "answers/trained/sft/all",
        "entry_point: ",
    ),
    "no mix is compared with a broken item": (
        "data/tasks/mmlu",
        "items.jsonl",
        3,
        row(lambda r: r.update(question=None)),
        MIX,
        "question: ",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_other_readers_refuse_a_line_that_they_cannot_use(message_of_step: Make, case: str) -> None:
    address, file, number, spoil, user, message = LINES[case]
    remake(address, rewrite(file, line(number, spoil)))
    assert re.match(rf"results/{address}/{re.escape(file)}, line {number}: {message}", message_of_step(user))


FORMATS = {"mmlu": "letter", "humaneval": "code"}
LETTER = "a task of format 'letter' needs"
ITEMS: dict[str, tuple[str, Bytes, str]] = {
    "half a line": ("mmlu", half_a_line, NO_JSON),
    "a null question": ("mmlu", row(lambda r: r.update(question=None)), "question: expected a value, found null"),
    "no question": ("mmlu", row(lambda r: r.pop("question")), f"question: {LETTER} str, found None"),
    "no choices": ("mmlu", row(lambda r: r.pop("choices")), f"choices: {LETTER} list, found None"),
    "an answer beyond the choices": (
        "mmlu",
        row(lambda r: r.update(answer=4)),
        r"answer: expected the number of one of 4 choices \(10 at most\), found 4",
    ),
    "an answer below the choices": (
        "mmlu",
        row(lambda r: r.update(answer=-1)),
        "answer: expected the number of one of 4 choices",
    ),
    "a word for an answer": ("mmlu", row(lambda r: r.update(answer="C")), f"answer: {LETTER} int, found 'C'"),
    "another number": ("mmlu", row(lambda r: r.update(item=9)), "expected item 4, found 9"),
    "a line lost": ("mmlu", lost, "expected item 4, found 5"),
    "no test": ("humaneval", row(lambda r: r.pop("test")), "test: a task of format 'code' needs str, found None"),
    "a null prompt": ("humaneval", row(lambda r: r.update(prompt=None)), "prompt: expected a value, found null"),
}


def lm_eval_task(task: str) -> Any:
    """A task as lm-eval is given it."""
    from llmfusion.evaluation.answers import config

    return config(task, TaskPrompt(format=FORMATS[task]), store.read(manifest_path(f"data/tasks/{task}")))


@pytest.mark.parametrize("case", ITEMS)
def test_a_test_item_that_cannot_be_asked_or_graded_is_refused(message_of_step: Make, case: str) -> None:
    task, spoil, message = ITEMS[case]
    remake(f"data/tasks/{task}", rewrite("items.jsonl", line(5, spoil)))
    expected = rf"results/data/tasks/{task}/items\.jsonl, line 5: {message}"
    assert re.match(expected, message_of_step(f"scores/trained/sft/{task}"))
    with pytest.raises(DamagedError, match=expected):
        lm_eval_task(task)


def test_fewer_items_than_were_staged_are_neither_asked_nor_graded(message_of_step: Make) -> None:
    assert lm_eval_task("mmlu")["task"] == "mmlu"
    remake("data/tasks/mmlu", rewrite("items.jsonl", line(24, lost)))
    expected = r"results/data/tasks/mmlu/items\.jsonl: expected 24 lines as the manifest tells, found 23"
    assert re.match(expected, message_of_step("scores/trained/sft/mmlu"))
    with pytest.raises(DamagedError, match=expected):
        lm_eval_task("mmlu")


LINE, COUNT = ", line 5: ", ": expected an answer to each of 24 items, found "
ANSWERS: dict[str, tuple[Bytes, str]] = {
    "half a line": (line(5, half_a_line), f"{LINE}{NO_JSON}"),
    "a null answer": (line(5, row(lambda r: r.update(answer=None))), f"{LINE}answer: expected a value, found null"),
    "no answer": (line(5, row(lambda r: r.pop("answer"))), f"{LINE}answer: expected text, found None"),
    "no prompt": (line(5, row(lambda r: r.pop("prompt"))), f"{LINE}prompt: expected text, found None"),
    "a number for an answer": (line(5, row(lambda r: r.update(answer=3.5))), f"{LINE}answer: expected text, found 3.5"),
    "a NaN beside it": (line(5, row(lambda r: r.update(score=NAN))), f"{LINE}{NO_JSON}: NaN is no number"),
    "the answer to another item": (line(5, row(lambda r: r.update(item=11))), f"{LINE}expected item 4, found 11"),
    "an answer lost": (line(5, lost), f"{LINE}expected item 4, found 5"),
    "the last answer lost": (line(24, lost), f"{COUNT}23"),
    "an answer too many": (lambda c: c + row(lambda r: r.update(item=24))(c.splitlines()[-1]), f"{COUNT}25"),
    "no answers": (lost, f"{COUNT}0"),
}


@pytest.mark.parametrize("task", FORMATS)
@pytest.mark.parametrize("case", ANSWERS)
def test_answers_that_are_not_to_the_items_are_not_scored(message_of_step: Make, case: str, task: str) -> None:
    spoil, message = ANSWERS[case]
    remake("answers/trained/sft/all", rewrite(f"{task}.jsonl", spoil))
    expected = rf"results/answers/trained/sft/all/{task}\.jsonl{message}"
    assert re.match(expected, message_of_step(f"scores/trained/sft/{task}"))


def test_answers_that_do_not_tell_how_they_were_asked_are_not_scored(message_of_step: Make) -> None:
    remake("answers/trained/sft/all", tasks={})
    expected = "results/answers/trained/sft/all: the manifest does not tell how mmlu was asked"
    assert re.match(expected, message_of_step("scores/trained/sft/mmlu"))


K_OF_N = "expected k right of n items"
SCORES: dict[str, tuple[dict[str, Any], str]] = {
    "k above n": ({"k": 25}, f"{K_OF_N}, found {{'k': 25, 'n': 24"),
    "k below 0": ({"k": -1}, K_OF_N),
    "no items": ({"k": 0, "n": 0}, K_OF_N),
    "half an answer right": ({"k": 7.5}, K_OF_N),
    "a null": ({"n": None}, K_OF_N),
    "a score of other answers": ({"score": 99.0}, "expected the score"),
    "another error": ({"stderr": 0.0}, "expected the score"),
    "a word for a score": ({"score": "high"}, "expected the score"),
    "no k": ({"k": ...}, "the manifest of scores/trained/sft/mmlu says nothing of 'k'"),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_score_that_cannot_be_is_in_no_table(message_of_step: Make, case: str) -> None:
    facts, expected = SCORES[case]
    remake("scores/trained/sft/mmlu", **facts)
    message = message_of_step("tables/table2")
    assert expected in message
    assert "scores/trained/sft/mmlu" in message


def test_a_score_that_is_not_a_number_cannot_be_written_honestly(message_of_step: Make) -> None:
    path = RESULTS / "scores/trained/sft/mmlu.json"
    path.write_text(re.sub(r'"score": [\d.]+', '"score": NaN', path.read_text()))
    expected = (
        rf"{path}: its content does not match .*found none: it holds a number that is not finite.*snakemake {path} -f"
    )
    assert re.match(expected, message_of_step("tables/table2"))


def test_what_is_sound_is_made_again_as_it_was(message_of_step: Make) -> None:
    """The refusals of these tests are of the damage: without it the same calls make the same bytes."""
    for address in ("data/mix/code", MERGED, "scores/trained/sft/mmlu", "tables/table2"):
        before = manifest_path(address).read_bytes()
        assert message_of_step(address) == ACCEPTED
        assert manifest_path(address).read_bytes() == before
