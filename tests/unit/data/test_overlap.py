import pytest

from llmfusion.data.overlap import Overlap, ngrams, words

LINE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def overlap():
    return Overlap(
        {"gsm8k": [{"question": LINE, "answer": "secret " * 13}], "code": [{"prompt": "a b c", "test": "d e f g h"}]}
    )


@pytest.mark.parametrize(
    ("text", "removed", "gsm8k", "code"),
    [
        (LINE, True, {"13": 1, "8": 1}, {"13": 0, "8": 0}),
        ("zero, " + LINE.upper().replace(" ", "! ") + " x", True, {"13": 1, "8": 1}, {"13": 0, "8": 0}),
        (LINE.rsplit(" ", 2)[0], False, {"13": 0, "8": 1}, {"13": 0, "8": 0}),
        (LINE.replace("seven", "7"), False, {"13": 0, "8": 0}, {"13": 0, "8": 0}),
        ("a b c d e f g h", False, {"13": 0, "8": 0}, {"13": 0, "8": 1}),
        ("secret " * 20, False, {"13": 0, "8": 0}, {"13": 0, "8": 0}),
    ],
    ids=[
        "the question",
        "other case and marks",
        "twelve words",
        "one word changed",
        "prompt and test",
        "answers do not count",
    ],
)
def test_only_thirteen_words_in_a_row_are_removed_and_eight_are_counted(text, removed, gsm8k, code):
    tests = overlap()
    assert tests.check(text) is removed
    assert tests.counts == {"gsm8k": gsm8k, "code": code}


def test_counts_add_up_over_samples():
    tests = overlap()
    assert [tests.check(t) for t in (LINE, "nothing", LINE)] == [True, False, True]
    assert tests.counts["gsm8k"] == {"13": 2, "8": 2}


def test_ngrams_are_runs_of_words():
    assert words("Don't stop: x+1=2.") == ["don", "t", "stop", "x", "1", "2"]
    assert len(ngrams("a b c d", 3)) == 2
    assert ngrams("a b", 3) == set()
    assert not Overlap({}).check(LINE)
