"""Answers graded right or wrong: cases written by hand, among them what a model must not crash the grader with."""

from pathlib import Path

import pytest

from llmfusion.evaluation.grading import normalise
from llmfusion.evaluation.task_format import TaskFormat, load_format, task_formats
from llmfusion.evaluation.tasks import boxed, letter, number
from llmfusion.evaluation.tasks.code import program
from llmfusion.study import data_plugins, plugins
from llmfusion.study.plugins import PluginError
from tests.unit.plugin_files import write_plugins


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True),
        (" B\n", True),
        ("(B)", True),
        ("B. red", True),
        ("B) red", True),
        ("The answer is B.", True),
        ("the answer is: (B)", True),
        ("The answer is A. No: the answer is B", True),
        ("Because.\nB", True),
        ("A", False),
        ("b", False),
        ("Bananas", False),
        ("", False),
        ("The answer is A, not B", False),
        ("The answer is Bananas", False),
        ("AB", False),
        ("red", False),
        ("blue", True),
        (" Blue\n", True),
        ("Answer: B", True),
    ],
)
def test_letter(text: str, right: bool) -> None:
    assert letter.grade(text, {"answer": 1, "choices": ["red", "blue", "green", "grey"]}) is right


@pytest.mark.parametrize("index", range(10))
def test_letter_counts_answers_from_zero(index: int) -> None:
    assert [letter.grade(f"The answer is {c}", {"answer": index}) for c in "ABCDEFGHIJ"] == [
        i == index for i in range(10)
    ]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 3 = 5\n#### 5", "5", True),
        ("#### 1,234", "1234", True),
        ("#### $70", "70", True),
        ("#### 5.0", "5", True),
        ("#### -3", "-3", True),
        ("so it is 18 in all.", "18", True),
        ("It costs $1,000.50.", "1000.5", True),
        ("\\boxed{12}", "12", True),
        ("first 3, then 4", "4", True),
        ("#### 5\nI used 7 steps", "5", True),
        ("\\boxed{5} after 7 steps", "5", True),
        ("#### 5 and \\boxed{6}", "5", True),
        ("first 3, then 4", "3", False),
        ("#### 5", "6", False),
        ("none", "0", False),
        ("", "0", False),
        ("\\boxed{nan}", "nan", False),
        ("#### 05", "5", True),
        ("\\boxed{}", "5", False),
        ("\\boxed{a}", "5", False),
        ("12", "1", False),
        ("#### 3", "3.0", True),
    ],
)
def test_number(text: str, answer: str, right: bool) -> None:
    assert number.grade(text, {"answer": answer}) is right


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        (".5", "\\frac{1}{2}"),
        ("-1/2", "\\frac{-1}{2}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("x = 5", "5"),
        ("50\\%", "50"),
        ("\\$5", "5"),
        ("90^\\circ", "90"),
        ("5.", "5"),
        ("\\text{east}", "east"),
        ("3 \\text{ cm}", "3"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("1 000", "1000"),
        ("10\\!000", "10000"),
    ],
)
def test_equal_answers_have_one_spelling(answer: str, reference: str) -> None:
    assert normalise(answer) == normalise(reference)
    assert boxed.grade(f"so \\boxed{{{answer}}}", {"answer": reference})


@pytest.mark.parametrize(
    ("answer", "reference"),
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
def test_different_answers_stay_different(answer: str, reference: str) -> None:
    assert not boxed.grade(f"\\boxed{{{answer}}}", {"answer": reference})


def test_an_answer_outside_the_box_is_wrong() -> None:
    assert not boxed.grade("5", {"answer": "5"})


@pytest.mark.parametrize("name", ["letter", "number", "boxed"])
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
def test_no_text_crashes_a_grader(name: str, text: str) -> None:
    item = {"answer": 0, "choices": ["red", "blue"]} if name == "letter" else {"answer": "5"}
    grade = task_formats()[name].grade
    assert grade is not None
    assert grade(text, item) is False
    assert grade(f"\\boxed{{{text}}}", item) is False


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
    assert number.grade(text, {"answer": "18"})
    assert not number.grade(text, {"answer": "8"})


@pytest.mark.parametrize("text", [r"\boxed{1{,}000}", r"\boxed{1,000}", r"\boxed{1000.0}"])
def test_thousands_are_one_number(text: str) -> None:
    assert number.grade(text, {"answer": "1000"})


@pytest.mark.parametrize("text", ["**B**", "The answer is **B**.", "The answer is a mammal.\nB"])
def test_bold_letters_count_and_articles_do_not(text: str) -> None:
    item = {"answer": 1, "choices": ["dog", "cat", "cow", "hen"]}
    assert letter.grade(text, item)
    assert not letter.grade(text, {**item, "answer": 0})


@pytest.mark.parametrize(
    ("name", "answer", "item", "extracted"),
    [
        ("letter", "The answer is **C**", {"answer": 0, "choices": ["a", "b", "c"]}, "C"),
        ("letter", " Cat ", {"answer": 0, "choices": ["dog", "cat"]}, "B"),
        ("letter", "cat", {"answer": 1, "choices": ["cat", "cat"]}, "B"),
        ("letter", "no idea", {"answer": 0, "choices": ["dog", "cat"]}, None),
        ("number", "2 + 3 = 5\n#### 1,005", {"answer": "5"}, "1,005"),
        ("number", "none", {"answer": "5"}, None),
        ("boxed", "so \\boxed{\\frac12}", {"answer": "1"}, "\\frac12"),
        ("boxed", "5", {"answer": "5"}, None),
        ("code", "```python\n    return x\n```", {"entry_point": "f"}, "    return x\n"),
    ],
)
def test_what_counts_of_an_answer_is_extracted(name: str, answer: str, item: dict, extracted: str | None) -> None:
    assert load_format(name).extracted(answer, item) == extracted


@pytest.mark.parametrize(
    ("name", "item", "problem"),
    [
        ("letter", {"question": "q", "choices": ["a", "b"], "answer": 1}, None),
        ("letter", {"question": "q", "choices": "ab", "answer": 1}, "choices: a task of format 'letter' needs list"),
        ("letter", {"question": "q", "choices": ["a", "b"], "answer": 2}, "answer: expected the number of one of 2"),
        ("letter", {"question": "q", "choices": ["a", "b"], "answer": -1}, "answer: expected the number of one of 2"),
        ("letter", {"question": "q", "choices": [*"abcdefghijk"], "answer": 0}, "of 11 choices (10 at most), found 0"),
        ("number", {"question": "q", "answer": 5}, "answer: a task of format 'number' needs str, found 5"),
        ("boxed", {"question": "q"}, "answer: a task of format 'boxed' needs str, found None"),
        ("code", {"prompt": "p", "test": "t"}, "entry_point: a task of format 'code' needs str, found None"),
    ],
)
def test_an_item_that_a_format_cannot_use_is_told_with_what_is_wrong(
    name: str, item: dict, problem: str | None
) -> None:
    assert (problem or "") in (load_format(name).item_problem(name, item) or "")
    assert (load_format(name).item_problem(name, item) is None) == (problem is None)


def test_formats_declare_what_the_other_rooms_ask() -> None:
    formats = task_formats()
    assert set(formats) == {"letter", "number", "boxed", "code"}
    assert [name for name, one in formats.items() if one.short_answer] == ["letter"]
    assert [name for name, one in formats.items() if one.runs_programs] == ["code"]
    assert all(repr(one.version) == "1.0" for one in formats.values())  # a fact of all answers that are stored
    assert all(plugins.summary_of(data_plugins.FORMATS, name) for name in formats)


def test_an_unknown_format_is_told_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"there is no task format 'leter'; did you mean 'letter'\?"):
        load_format("leter")


COMPLETE = "doc_to_text='{{ q }}', doc_to_target='{{ a }}', version=1.0, item_fields={'q': str}"
BROKEN = {
    "no format": ("", "needs: FORMAT; missing: FORMAT"),
    "no TaskFormat": ("FORMAT = 'number'", "FORMAT must be a TaskFormat"),
    "no templates": (
        "FORMAT = TaskFormat(version=1.0, item_fields={'a': str}, grade=lambda answer, item: True)",
        "FORMAT needs doc_to_text; FORMAT needs doc_to_target",
    ),
    "no grader": (f"FORMAT = TaskFormat({COMPLETE})", "FORMAT needs either grade or program"),
    "another grader": (f"FORMAT = TaskFormat({COMPLETE}, grade=lambda a: True)", r"grade must take \(answer, item\)"),
    "no test to run": (
        f"FORMAT = TaskFormat({COMPLETE}, program=lambda a, i: a)",
        "needs the item field entry_point; .* prompt; .* test",
    ),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_format_is_refused_by_its_file_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    head = '"""A format."""\nfrom llmfusion.evaluation.task_format import TaskFormat\n'
    monkeypatch.setattr(data_plugins, "FORMATS", write_plugins(tmp_path, monkeypatch, broken=head + source))
    with pytest.raises(PluginError, match=rf"broken\.py: .*{message}"):
        data_plugins.task_formats.__wrapped__()


def test_a_new_file_is_a_new_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = '"""Anything."""\nfrom llmfusion.evaluation.task_format import TaskFormat\n'
    source = f"FORMAT = TaskFormat({COMPLETE}, grade=lambda answer, item: answer == item['q'])"
    monkeypatch.setattr(data_plugins, "FORMATS", write_plugins(tmp_path, monkeypatch, echo=head + source))
    assert data_plugins.task_formats.__wrapped__()["echo"].grade("yes", {"q": "yes"})


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target"])
def test_a_format_whose_text_is_no_template_is_incomplete(key):
    texts = {"doc_to_text": "{{ question }}", "doc_to_target": "{{ answer }}", key: "{{ question"}
    made = TaskFormat(version=1.0, item_fields={"question": str}, grade=lambda answer, item: True, **texts)
    [problem] = made.problems()
    assert problem.startswith(f"{key} is no Jinja template: ")
