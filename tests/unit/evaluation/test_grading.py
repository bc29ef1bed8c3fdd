"""Answers graded right or wrong: cases written by hand, among them what a model must not crash the grader with."""

import pytest

from llmfusion.evaluation.grading import GRADERS, boxed, last_boxed, letter, normalise, number, program


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), (" B\n", True), ("(B)", True), ("B. red", True), ("B) red", True), ("The answer is B.", True), ("the answer is: (B)", True),
        ("The answer is A. No: the answer is B", True), ("Because.\nB", True),
        ("A", False), ("b", False), ("Bananas", False), ("", False), ("The answer is A, not B", False), ("The answer is Bananas", False), ("AB", False),
        ("red", False), ("blue", True), (" Blue\n", True), ("Answer: B", True),
    ],
)  # fmt: skip
def test_letter(text: str, right: bool) -> None:
    assert letter(text, {"answer": 1, "choices": ["red", "blue", "green", "grey"]}) is right


@pytest.mark.parametrize("index", range(10))
def test_letter_counts_answers_from_zero(index: int) -> None:
    assert [letter(f"The answer is {c}", {"answer": index}) for c in "ABCDEFGHIJ"] == [i == index for i in range(10)]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 3 = 5\n#### 5", "5", True), ("#### 1,234", "1234", True), ("#### $70", "70", True), ("#### 5.0", "5", True), ("#### -3", "-3", True),
        ("so it is 18 in all.", "18", True), ("It costs $1,000.50.", "1000.5", True), ("\\boxed{12}", "12", True), ("first 3, then 4", "4", True),
        ("#### 5\nI used 7 steps", "5", True), ("\\boxed{5} after 7 steps", "5", True), ("#### 5 and \\boxed{6}", "5", True),
        ("first 3, then 4", "3", False), ("#### 5", "6", False), ("none", "0", False), ("", "0", False), ("\\boxed{nan}", "nan", False),
        ("#### 05", "5", True), ("\\boxed{}", "5", False), ("\\boxed{a}", "5", False), ("12", "1", False), ("#### 3", "3.0", True),
    ],
)  # fmt: skip
def test_number(text: str, answer: str, right: bool) -> None:
    assert number(text, {"answer": answer}) is right


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{3}", "3"), ("a \\boxed{1} b \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\fbox{7}", "7"), ("\\boxed 5$", "5"),
        ("\\boxed{1} \\fbox{2}", "2"), ("\\boxed{}", ""), ("\\boxed{3", None), ("boxed{3}", None), ("", None), ("\\boxed", None), ("\\boxed ", None),
        ("\\boxed $", None), ("\\boxed $5$", None), ("\\boxed\n5", None), ("\\boxed{1}\\boxed{", None),
    ],
)  # fmt: skip
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("\\frac12", "\\frac{1}{2}"), ("\\dfrac{1}{2}", "\\frac{1}{2}"), ("1/2", "\\frac{1}{2}"), ("0.5", "\\frac{1}{2}"), (".5", "\\frac{1}{2}"),
        ("-1/2", "\\frac{-1}{2}"), ("\\sqrt3", "\\sqrt{3}"), ("x = 5", "5"), ("50\\%", "50"), ("\\$5", "5"), ("90^\\circ", "90"), ("5.", "5"),
        ("\\text{east}", "east"), ("3 \\text{ cm}", "3"), ("\\left( 1, 2 \\right)", "(1,2)"), ("1 000", "1000"), ("10\\!000", "10000"),
    ],
)  # fmt: skip
def test_equal_answers_have_one_spelling(given: str, reference: str) -> None:
    assert normalise(given) == normalise(reference)
    assert boxed(f"so \\boxed{{{given}}}", {"answer": reference})


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ("1", "2"),
        ("\\frac{1}{3}", "\\frac{1}{2}"),
        ("(1,2)", "(2,1)"),
        ("-5", "5"),
        ("", "0"),
        ("\\sqrt{2}", "2"),
        ("12", "1"),
    ],
)
def test_different_answers_stay_different(given: str, reference: str) -> None:
    assert not boxed(f"\\boxed{{{given}}}", {"answer": reference})


def test_an_answer_outside_the_box_is_wrong() -> None:
    assert not boxed("5", {"answer": "5"})


@pytest.mark.parametrize("kind", GRADERS)
@pytest.mark.parametrize(
    "text",
    [
        "\\boxed",
        "\\boxed $",
        "\\boxed{",
        "####",
        "#### $",
        "answer is",
        "\0",
        "é",
        "{" * 50,
        "\\frac",
        "=",
        "==",
        "\\text{ ",
        "-",
        ",",
        "$" * 9,
        "1e999",
    ],
)
def test_no_text_crashes_a_grader(kind: str, text: str) -> None:
    item = {"answer": 0, "choices": ["red", "blue"]} if kind == "letter" else {"answer": "5"}
    assert GRADERS[kind](text, item) is False
    assert GRADERS[kind](f"\\boxed{{{text}}}", item) is False


ITEM = {"entry_point": "f", "prompt": 'import math\n\n\ndef f(x):\n    """Double."""\n'}


@pytest.mark.parametrize(
    "answer",
    [
        "    return 2 * x\n",
        "```python\n    return 2 * x\n```",
        "def f(x):\n    return 2 * x\n",
        "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nIt doubles.",
        "```py\nfrom math import sqrt\n\ndef f(x):\n    return 2 * x\n```\n```python\nprint('a second block')\n```",
        "```\ndef helper(x):\n    return x\n\ndef f(x):\n    return x + helper(x)",
    ],
)
def test_a_program_is_found_in_an_answer_however_it_is_wrapped(answer: str) -> None:
    names: dict = {}
    exec(ITEM["prompt"] + program(answer, ITEM), names)
    assert names["f"](21) == 42


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{18}",
        r"\boxed{\$18}",
        r"\boxed{18 \text{ dollars}}",
        r"\boxed{18\%}",
        r"\boxed{\text{18}}",
        r"\boxed{x=18}",
        r"so 3 + 15 = \boxed{18}, and 7 remain",
    ],
)
def test_a_boxed_number_counts_in_every_common_spelling(text: str) -> None:
    assert number(text, {"answer": "18"})
    assert not number(text, {"answer": "8"})


@pytest.mark.parametrize("text", [r"\boxed{1{,}000}", r"\boxed{1,000}", r"\boxed{1000.0}"])
def test_thousands_are_one_number(text: str) -> None:
    assert number(text, {"answer": "1000"})


@pytest.mark.parametrize("text", ["**B**", "The answer is **B**.", "The answer is a mammal.\nB"])
def test_bold_letters_count_and_articles_do_not(text: str) -> None:
    item = {"answer": 1, "choices": ["dog", "cat", "cow", "hen"]}
    assert letter(text, item)
    assert not letter(text, {**item, "answer": 0})
