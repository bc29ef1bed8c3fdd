import random

import pytest

from llmfusion.data.layouts import LAYOUTS, TASK_LAYOUTS, chat, split

RNG = random.Random(0)
HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "Be kind"}, *HELLO["messages"]]}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("pair", {"q": "Hi", "a": "Hello", "other": 1}, HELLO),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            HELLO,
        ),
        (
            "conversations",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            HELLO,
        ),
        ("conversations", {"conversations": [{"from": "gpt", "value": "Hello"}]}, None),
        ("chatml", {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"}, HELLO),
        ("chatml", {"text": "no turns at all"}, None),
        (
            "clusters",
            {"instruction": "Be kind", "cluster": {"samples": [{"input": "Hi", "output": "Hello"}]}},
            WITH_SYSTEM,
        ),
        ("clusters", {"instruction": "", "cluster": {"samples": [{"input": "Hi", "output": "Hello"}]}}, HELLO),
        ("clusters", {"instruction": "", "cluster": {"samples": []}}, None),
        ("text", {"text": "words"}, {"text": "words"}),
        ("text", {"text": " \n"}, None),
        ("text", {"text": None}, None),
    ],
)
def test_a_row_of_each_layout(layout, row, expected):
    assert LAYOUTS[layout](row, {"prompt": "q", "response": "a"}, RNG) == expected


def test_clusters_takes_every_sample_of_a_cluster_now_and_then():
    row = {"instruction": "", "cluster": {"samples": [{"input": "Hi", "output": str(i)} for i in range(3)]}}
    assert {LAYOUTS["clusters"](row, {}, RNG)["messages"][1]["content"] for _ in range(100)} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "ua"),
        ([("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "suaua"),
        ([("assistant", "b")], None),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], None),
        ([("user", "a"), ("system", "s"), ("assistant", "c")], None),
        ([("tool", "a"), ("assistant", "c")], None),
        ([("user", "a"), ("assistant", " ")], None),
        ([("user", "a"), ("assistant", None)], None),
        ([("user", "a"), ("assistant", 7)], None),
        ([("system", "s")], None),
        ([("user", "a")], None),
        ([], None),
    ],
)
def test_chat_keeps_only_alternating_turns_that_end_with_the_assistant(turns, kept):
    found = chat(turns)
    assert (found and "".join(m["role"][0] for m in found["messages"])) == kept


def test_split_cuts_between_turns_and_repeats_the_system_turn():
    turns = [
        ("system", "S"),
        ("user", "aa"),
        ("assistant", "bb"),
        ("user", "cc"),
        ("assistant", "dd"),
        ("user", "e" * 9),
        ("assistant", "ff"),
    ]
    parts = split(chat(turns), 8)
    assert [["".join(m["content"] for m in part["messages"])] for part in parts] == [
        ["Saabbccdd"],
        ["S" + "e" * 9 + "ff"],
    ]
    assert split(chat(turns), 7)[0]["messages"][1:] == chat(turns)["messages"][1:3]
    assert split(chat(turns), None) == [chat(turns)]
    assert split({"text": "x" * 99}, 8) == [{"text": "x" * 99}]


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("mmlu", {"question": " Q ", "choices": ["a", "b"], "answer": 1, "subject": "s"}, {"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "s"}),
        ("gsm8k", {"question": "Q", "answer": "1,000 + 234\n#### 1,234"}, {"question": "Q", "answer": "1234", "solution": "1,000 + 234"}),
        (
            "math",
            {"problem": "P", "solution": r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", "type": "Algebra"},
            {"question": "P", "answer": r"\frac{1}{2}", "solution": r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", "subject": "Algebra"},
        ),
        ("math", {"problem": "P", "solution": "no box", "type": "Algebra"}, None),
        ("humaneval", {"task_id": "H/0", "prompt": "p", "entry_point": "f", "test": "t", "canonical_solution": "c"},
         {"task_id": "H/0", "prompt": "p", "entry_point": "f", "test": "t"}),
    ],
)  # fmt: skip
def test_a_row_of_each_task_layout(layout, row, expected):
    assert TASK_LAYOUTS[layout](row) == expected
