import pytest

from llmfusion.data.turns import chat, split_between_turns


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
    sample = chat(turns)
    assert (sample and "".join(m["role"][0] for m in sample["messages"])) == kept


def test_a_split_cuts_between_turns_and_repeats_the_system_turn():
    turns = [
        ("system", "S"),
        ("user", "aa"),
        ("assistant", "bb"),
        ("user", "cc"),
        ("assistant", "dd"),
        ("user", "e" * 9),
        ("assistant", "ff"),
    ]
    parts = split_between_turns(chat(turns), 8)
    assert [["".join(m["content"] for m in part["messages"])] for part in parts] == [
        ["Saabbccdd"],
        ["S" + "e" * 9 + "ff"],
    ]
    assert split_between_turns(chat(turns), 7)[0]["messages"][1:] == chat(turns)["messages"][1:3]
    assert split_between_turns(chat(turns), None) == [chat(turns)]
    assert split_between_turns({"text": "x" * 99}, 8) == [{"text": "x" * 99}]
