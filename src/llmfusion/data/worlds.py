"""The miniature study's own worlds: texts, questions and held-out tests, made deterministically from a seed.

They mirror the paper's four benchmarks: multiple choice about facts (MMLU), one-step word problems with a worked
equation (GSM8K), two-step expressions (MATH) and one-line functions (HumanEval). What a question asks is its *content*;
a content whose hash is 0 modulo 4 belongs to the test and appears in no raw text and no training question.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmfusion.errors import UserError

ANIMALS = [
    "blicket",
    "dax",
    "fep",
    "gorp",
    "kiv",
    "lorp",
    "mib",
    "nupp",
    "pim",
    "quib",
    "rell",
    "snorg",
    "tulv",
    "vash",
    "wug",
    "zeb",
]
ATTRIBUTES: dict[str, tuple[list[str], str, list[str]]] = {
    # attribute: (values, sentence of a raw text, questions)
    "colour": (
        ["red", "blue", "green", "black", "white", "pink"],
        "The {a} is {v}.",
        [
            "What colour is the {a}?",
            "Which colour does a {a} have?",
            "Name the colour of the {a}.",
            "A {a} has which colour?",
        ],
    ),
    "home": (
        ["caves", "trees", "lakes", "hills", "sand", "snow"],
        "The {a} lives in {v}.",
        [
            "Where does the {a} live?",
            "What is the home of the {a}?",
            "Name the home of the {a}.",
            "A {a} lives in what?",
        ],
    ),
    "food": (
        ["figs", "nuts", "fish", "grass", "worms", "corn"],
        "The {a} eats {v}.",
        ["What does the {a} eat?", "What is the food of the {a}?", "Name the food of the {a}.", "A {a} eats what?"],
    ),
    "sound": (
        ["hums", "barks", "clicks", "roars", "sings", "hoots"],
        "The {a} {v}.",
        [
            "What does the {a} do when it calls?",
            "How does a {a} sound?",
            "Name the call of the {a}.",
            "A {a} calls in what way?",
        ],
    ),
}
NAMES = ["Tom", "Ann", "Max", "Eva", "Sam", "Mia", "Ben", "Zoe"]
THINGS = ["apples", "pens", "cups", "books", "coins", "eggs"]
WORD_PROBLEMS: dict[str, list[tuple[str, str]]] = {
    # operation: (question, the same as a story that holds the result)
    "+": [
        (
            "{n} has {x} {t} and gets {y} more. How many {t} does {n} have?",
            "{n} has {x} {t} and gets {y} more. Now {n} has {z} {t}.",
        ),
        (
            "{n} buys {x} {t} and then {y} {t}. How many {t} is that?",
            "{n} buys {x} {t} and then {y} {t}. That is {z} {t}.",
        ),
    ],
    "*": [
        (
            "{n} has {x} bags with {y} {t} each. How many {t} does {n} have?",
            "{n} has {x} bags with {y} {t} each. {n} has {z} {t}.",
        ),
        (
            "{n} takes {y} {t} from each of {x} boxes. How many {t} is that?",
            "{n} takes {y} {t} from each of {x} boxes. That is {z} {t}.",
        ),
    ],
}
FORMS: list[tuple[str, str, str]] = [
    # expression of f, a, b; its first step; the second step with {s} for the first result
    ("{f} * ({a} + {b})", "{a} + {b}", "{f} * {s}"),
    ("({a} + {b}) * {f}", "{a} + {b}", "{s} * {f}"),
    ("{f} * {a} + {b}", "{f} * {a}", "{s} + {b}"),
    ("{b} + {f} * {a}", "{f} * {a}", "{b} + {s}"),
]
ASKS = ["Compute {e}.", "What is {e}?", "Find {e}."]
FUNCTIONS: list[tuple[str, str]] = [
    ("x plus {k}", "x + {k}"),
    ("x minus {k}", "x - {k}"),
    ("x times {k}", "x * {k}"),
    ("{k} minus x", "{k} - x"),
    ("x times {k} plus {m}", "x * {k} + {m}"),
    ("x times {k} minus {m}", "x * {k} - {m}"),
    ("{k} plus x, times {m}", "({k} + x) * {m}"),
    ("x minus {k}, times {m}", "(x - {k}) * {m}"),
    ("the larger of x and {k}, plus {m}", "max(x, {k}) + {m}"),
    ("the larger of x and {k}", "max(x, {k})"),
    ("the smaller of x and {k}", "min(x, {k})"),
    ("the square of x plus {k}", "x * x + {k}"),
]
MISSES = 200_000  # draws that give no new test item, after which there are none left
INPUTS = [-7, -1, 0, 3, 12]  # on which the functions are tested
LETTERS = "ABCD"


@dataclass(frozen=True)
class GeneratedRow:
    """One draw: its content, a raw text, a question with its answer, a wrong answer, and the test item's fields."""

    content: str
    text: str
    prompt: str
    response: str
    wrong: str
    item: dict[str, Any]


def is_test(content: str) -> bool:
    """Whether a content is held out: a quarter of them, by hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") % 4 == 0


def _facts() -> dict[tuple[str, str], str]:
    rng = random.Random("facts of the invented animals")
    return {(animal, name): rng.choice(values) for animal in ANIMALS for name, (values, _, _) in ATTRIBUTES.items()}


FACTS = _facts()


def animals(rng: random.Random) -> GeneratedRow:
    """Multiple choice over invented animals; content is the question, which pairs a fact with a template."""
    animal = rng.choice(ANIMALS)
    name = rng.choice(list(ATTRIBUTES))
    values, sentence, questions = ATTRIBUTES[name]
    true = FACTS[animal, name]
    choices = [true, *rng.sample([v for v in values if v != true], 3)]
    rng.shuffle(choices)
    question = rng.choice(questions).format(a=animal)
    right = choices.index(true)
    return GeneratedRow(
        content=question,
        text=sentence.format(a=animal, v=true),
        prompt="\n".join([question, *(f"{letter}. {v}" for letter, v in zip(LETTERS, choices, strict=True))]),
        response=true,  # the value, not its letter: two layers learn to recall facts, not to look letters up
        wrong=choices[(right + rng.randint(1, 3)) % 4],
        item={"question": question, "choices": choices, "answer": right},
    )


def sums(rng: random.Random) -> GeneratedRow:
    """One-step word problems (sums up to 20, products of 2..6), answered by an equation and ``#### N``.

    The raw texts are the equations alone.
    """
    x, y, z, operation = _numbers(rng)
    fields = {"n": rng.choice(NAMES), "t": rng.choice(THINGS), "x": x, "y": y, "z": z}
    question = rng.choice(WORD_PROBLEMS[operation])[0].format(**fields)
    bad = z + rng.choice([-2, -1, 1, 2])
    equation = f"{x} {operation} {y} = {z}"
    return GeneratedRow(
        content=question,
        text=equation,
        prompt=question,
        response=f"{equation}\n#### {z}",
        wrong=f"{x} {operation} {y} = {bad}\n#### {bad}",
        item={"question": question, "answer": str(z)},
    )


def stories(rng: random.Random) -> GeneratedRow:
    """The word problems told as stories, result included; content is the question they would answer."""
    x, y, z, operation = _numbers(rng)
    fields = {"n": rng.choice(NAMES), "t": rng.choice(THINGS), "x": x, "y": y, "z": z}
    question, story = (template.format(**fields) for template in rng.choice(WORD_PROBLEMS[operation]))
    return GeneratedRow(
        content=question,
        text=story,
        prompt=question,
        response=story,
        wrong="",
        item={"question": question, "answer": str(z)},
    )


def _numbers(rng: random.Random) -> tuple[int, int, int, str]:
    """``(x, y, z, operation)`` with x operation y = z."""
    if rng.random() < 0.5:
        x = rng.randint(1, 18)
        y = rng.randint(1, 20 - x)
        return x, y, x + y, "+"
    x = rng.randint(2, 6)
    y = rng.randint(2, 6)
    return x, y, x * y, "*"


def steps(rng: random.Random) -> GeneratedRow:
    """Two-step expressions (operands 1..6, factor 2..4) worked line by line, the result in ``\\boxed{}``."""
    expression_form, first_form, second_form = rng.choice(FORMS)
    values = {"f": rng.randint(2, 4), "a": rng.randint(1, 6), "b": rng.randint(1, 6)}
    expression = expression_form.format(**values)
    first = first_form.format(**values)
    first_result = _value(first)
    second = second_form.format(**values, s=first_result)
    z = _value(second)
    question = rng.choice(ASKS).format(e=expression)
    bad = z + rng.choice([-2, -1, 1, 2])
    solution = f"{first} = {first_result}\n{second} = "
    return GeneratedRow(
        content=expression,
        text=f"{expression} = {second} = {z}",
        prompt=question,
        response=f"{solution}{z}\n\\boxed{{{z}}}",
        wrong=f"{solution}{bad}\n\\boxed{{{bad}}}",
        item={"question": question, "answer": str(z)},
    )


def _value(expression: str) -> int:
    """Value of ``A op B`` with op + or *."""
    left, operation, right = expression.split()
    return int(left) + int(right) if operation == "+" else int(left) * int(right)


def code(rng: random.Random) -> GeneratedRow:
    """One-line functions from a docstring, checked by running them on five inputs; content is the description."""
    function = rng.choice(FUNCTIONS)
    values = {"k": rng.randint(2, 9), "m": rng.randint(2, 9)}
    name = rng.choice(["f", "g", "h"])
    description, body = (template.format(**values) for template in function)
    head = f'def {name}(x):\n    """Return {description}."""'
    bad = _broken(body, rng)
    checks = "\n".join(f"    assert candidate({x}) == {_call(body, x)}" for x in INPUTS)
    return GeneratedRow(
        content=description,
        text=f"{head}\n    return {body}",
        prompt=head,
        response=f"    return {body}",
        wrong=f"    return {bad}",
        item={"prompt": head + "\n", "entry_point": name, "test": f"def check(candidate):\n{checks}\n"},
    )


def _broken(body: str, rng: random.Random) -> str:
    """The same body with another number in it."""
    digits = [i for i, c in enumerate(body) if c.isdigit()]
    if not digits:
        raise ValueError(f"no number in {body!r}")
    i = rng.choice(digits)
    return body[:i] + str(rng.choice([d for d in range(2, 10) if str(d) != body[i]])) + body[i + 1 :]


def _call(body: str, x: int) -> int:
    return eval(body, {"__builtins__": {}, "max": max, "min": min}, {"x": x})  # the body is ours, from FUNCTIONS


WORLDS: dict[str, Callable[[random.Random], GeneratedRow]] = {
    "animals": animals,
    "sums": sums,
    "steps": steps,
    "stories": stories,
    "code": code,
}


def draw(generator: str, form: str, rows: int, seed: int, wrong: float = 0.0) -> Iterator[dict[str, Any]]:
    """Draw ``rows`` rows of a world.

    ``form`` text gives ``{"text"}``, chat ``{"messages"}`` (a share ``wrong`` of the answers is wrong), test the fields
    of a task item, each prompt once. Raises :class:`UserError` if a test asks for more items than the world holds out.
    """
    rng = random.Random(f"{generator} {form} {seed}")
    if form == "test":
        yield from _test_items(generator, rows, rng)
        return
    may_use_all = form == "text" and generator in (
        "animals",
        "sums",
    )  # facts and equations, not the questions of a test
    while rows > 0:
        row = WORLDS[generator](rng)
        if may_use_all or not is_test(row.content):
            rows -= 1
            yield {"text": row.text} if form == "text" else _chat(row, rng.random() < wrong)


def _test_items(generator: str, rows: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    misses = 0
    while len(seen) < rows:
        row = WORLDS[generator](rng)
        if is_test(row.content) and row.prompt not in seen:
            seen.add(row.prompt)
            yield row.item
            continue
        misses += 1
        if misses > MISSES:
            raise UserError(f"generator {generator}: {rows} test items asked, the world holds out only {len(seen)}")


def _chat(row: GeneratedRow, wrong: bool) -> dict[str, Any]:
    answer = row.wrong if wrong else row.response
    return {"messages": [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]}
