import functools
import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from llmfusion.data.worlds import WORLDS, GeneratedRow, draw, is_test
from llmfusion.errors import UserError

CHATS = ("animals", "sums", "steps", "code")
TESTS = {"animals": 300, "sums": 300, "steps": 228, "code": 225}
DRAWS = 3000
MEANING = {  # what a docstring says, by hand
    r"x plus (\d)": lambda x, k: x + k,
    r"x minus (\d)": lambda x, k: x - k,
    r"x times (\d)": lambda x, k: x * k,
    r"(\d) minus x": lambda x, k: k - x,
    r"x times (\d) plus (\d)": lambda x, k, m: x * k + m,
    r"x times (\d) minus (\d)": lambda x, k, m: x * k - m,
    r"(\d) plus x, times (\d)": lambda x, k, m: (k + x) * m,
    r"x minus (\d), times (\d)": lambda x, k, m: (x - k) * m,
    r"the larger of x and (\d), plus (\d)": lambda x, k, m: (x if x > k else k) + m,
    r"the larger of x and (\d)": lambda x, k: x if x > k else k,
    r"the smaller of x and (\d)": lambda x, k: x if x < k else k,
    r"the square of x plus (\d)": lambda x, k: x**2 + k,
}
SEE = "import hashlib, json; from llmfusion.data.worlds import WORLDS, draw\n"
SEE += "pairs = [(w, f) for w in WORLDS for f in ('text', 'chat', 'test') if (w, f) != ('stories', 'chat')]\n"
SEE += "rows = [r for w, f in pairs for r in draw(w, f, 50, 3, 0.3)]\n"
SEE += "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"


@functools.cache
def texts(generator, form, seed=1, rows=DRAWS):
    return [
        "\n".join(m["content"] for m in row["messages"]) if form == "chat" else row["text"]
        for row in draw(generator, form, rows, seed)
    ]


def facts():
    """The facts as the raw texts tell them."""
    values = {}
    for text in texts("animals", "text"):
        _, animal, value = text.removesuffix(".").split(" ", 2)
        for verb, name in (("is ", "colour"), ("lives in ", "home"), ("eats ", "food"), ("", "sound")):
            if value.startswith(verb):
                values.setdefault((animal, name), set()).add(value.removeprefix(verb))
                break
    return values


def attribute(question):
    patterns = {"colour": "colour", "home": r"\blive|home", "food": r"\beat|food", "sound": r"call|sound"}
    return next(name for name, words in patterns.items() if re.search(words, question))


def right_animals(prompt, response):
    question, *options = prompt.split("\n")
    words = set(re.findall(r"\w+", response))
    offered = [set(re.findall(r"\w+", option)) for option in options]
    [chosen] = [option for option in offered if option & words]  # by its letter, its value or both, which must agree
    animal = next(word.rstrip("?.") for word in question.split() if (word.rstrip("?."), "colour") in FACTS)
    return chosen - set("ABCD") == FACTS[animal, attribute(question)]


def right_sums(prompt, response):
    x, y = map(int, re.findall(r"\d+", prompt))
    line, _, answer = response.partition("\n#### ")
    equation, _, result = line.partition(" = ")
    assert sorted(map(int, re.findall(r"\d+", equation))) == sorted((x, y))
    assert answer == result
    return int(answer) == (x * y if "each" in prompt else x + y)


def right_steps(prompt, response):
    expression = re.search(r"[(\d][\d +*()]*\d\)?", prompt)[0]
    first, second, boxed = response.split("\n")
    assert all(eval(left) == int(value) for left, value in [first.split(" = ")])
    assert eval(second.split(" = ")[0]) == eval(expression)  # the step is right even where the result is not
    answer = int(re.fullmatch(r"\\boxed\{(-?\d+)\}", boxed)[1])
    assert int(second.split(" = ")[1]) == answer
    return answer == eval(expression)


def meaning(prompt):
    """What the docstring of a prompt says, as a function, and the numbers in it."""
    description = re.search(r'"""Return (.*)\."""', prompt)[1]
    [(pattern, meant)] = [(p, f) for p, f in MEANING.items() if re.fullmatch(p, description)]
    return meant, list(map(int, re.fullmatch(pattern, description).groups()))


def right_code(prompt, response):
    scope = {}
    exec(f"{prompt}\n{response}", scope)
    function = next(value for name, value in scope.items() if name in "fgh")
    meant, numbers = meaning(prompt)
    return all(function(x) == meant(x, *numbers) for x in range(-20, 21))


RIGHT = {"animals": right_animals, "sums": right_sums, "steps": right_steps, "code": right_code}
FACTS = facts()


def test_every_animal_has_one_value_for_each_attribute():
    assert len(FACTS) == 16 * 4
    assert all(len(values) == 1 for values in FACTS.values())


def test_draws_are_the_same_in_every_process_and_differ_by_seed():
    seen = {
        subprocess.run(
            [sys.executable, "-c", SEE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(seen) == 1
    assert list(draw("sums", "chat", 20, 1)) != list(draw("sums", "chat", 20, 2))


@pytest.mark.parametrize("generator", CHATS)
def test_no_question_of_a_test_is_ever_trained_on(generator):
    items = list(draw(generator, "test", TESTS[generator], 42))
    questions = {item.get("question", item.get("prompt")).strip() for item in items}
    for form, seed in itertools.product(("text", "chat"), (1, 2)):
        trained = "\n\n".join(texts(generator, form, seed))
        assert not [question for question in questions if question in trained]


def opening(text):
    """What a word problem and its story have in common: all before the question, or before the last sentence."""
    return re.split(r"\. How |\. (?=Now|That|\w+ has \d+ \w+\.$)", text)[0]


def test_no_story_tells_what_a_test_asks():
    items = [*draw("sums", "test", 300, 42), *draw("stories", "test", 300, 42)]
    held_out = {opening(item["question"]) for item in items}
    stories = {opening(text) for text in texts("stories", "text")}
    trained = {opening(text.split("\n")[0]) for text in texts("sums", "chat")}
    assert len(trained & stories) > 200  # questions and stories are cut alike
    assert not held_out & stories


def test_no_expression_of_a_test_is_told_under_another_question():
    held_out = {re.search(r"[(\d][\d +*()]*\d\)?", item["question"])[0] for item in draw("steps", "test", 228, 42)}
    written = {text.split(" = ")[0] for text in texts("steps", "text")}
    questions = {re.search(r"[(\d][\d +*()]*\d\)?", text.split("\n")[0])[0] for text in texts("steps", "chat")}
    assert held_out
    assert not held_out & (written | questions)


def test_no_docstring_of_a_test_is_shown_under_another_name():
    held_out = {re.search(r"Return .*\.", item["prompt"])[0] for item in draw("code", "test", 225, 42)}
    shown = "\n".join([*texts("code", "text"), *texts("code", "chat")])
    assert not {text for text in held_out if text in shown}


@pytest.mark.parametrize("generator", CHATS)
def test_a_share_of_the_answers_is_wrong_and_all_others_are_right(generator):
    verdicts = [
        RIGHT[generator](*(m["content"] for m in row["messages"])) for row in draw(generator, "chat", DRAWS, 5, 0.35)
    ]
    assert 0.32 < verdicts.count(False) / DRAWS < 0.38
    assert all(RIGHT[generator](*(m["content"] for m in row["messages"])) for row in draw(generator, "chat", 500, 5))


@pytest.mark.parametrize("generator", TESTS)
def test_test_items_are_distinct_and_as_many_as_asked(generator):
    items = list(draw(generator, "test", TESTS[generator], 42))
    assert len({str(item) for item in items}) == len(items) == TESTS[generator]


def test_the_answers_of_test_items_are_right():
    for item in draw("animals", "test", 300, 42):
        chosen = item["choices"][item["answer"]]
        animal = next(word.rstrip("?.") for word in item["question"].split() if (word.rstrip("?."), "colour") in FACTS)
        assert {chosen} == FACTS[animal, attribute(item["question"])]
    for item in draw("sums", "test", 300, 42):
        x, y = map(int, re.findall(r"\d+", item["question"]))
        assert int(item["answer"]) == (x * y if "each" in item["question"] else x + y)
    for item in draw("steps", "test", 228, 42):
        assert int(item["answer"]) == eval(re.search(r"[(\d][\d +*()]*\d\)?", item["question"])[0])


def test_the_right_letter_stands_at_every_place():
    places = Counter(item["answer"] for item in draw("animals", "test", 300, 42))
    assert min(places[i] for i in range(4)) > 40


def test_the_test_program_of_a_function_passes_what_was_said_and_fails_another():
    for item in draw("code", "test", 100, 42):
        scope = {}
        exec(item["test"], scope)
        meant, numbers = meaning(item["prompt"])
        scope["check"](lambda x, meant=meant, numbers=numbers: meant(x, *numbers))
        with pytest.raises(AssertionError):
            scope["check"](lambda x, meant=meant, numbers=numbers: meant(x, *numbers) + 1)


def test_more_items_than_a_world_holds_out_are_refused_with_their_number(monkeypatch):
    contents = [str(i) for i in range(40)]
    monkeypatch.setitem(
        WORLDS,
        "code",
        lambda rng: GeneratedRow(content := rng.choice(contents), "", content, "", "", {"prompt": content}),
    )
    held_out = sum(map(is_test, contents))
    assert len(list(draw("code", "test", held_out, 1))) == held_out
    with pytest.raises(
        UserError, match=f"generator code: {held_out + 1} test items asked, the world holds out only {held_out}"
    ):
        list(draw("code", "test", held_out + 1, 1))


def test_every_world_gives_as_many_rows_as_asked():
    assert all(len(list(draw(generator, "text", 37, 1))) == 37 for generator in WORLDS)
