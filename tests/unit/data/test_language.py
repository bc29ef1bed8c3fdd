"""Languages told by prose: short texts in eight languages, English with code and LaTeX, and what is left of a text."""

import pytest

from llmfusion.data.language import LEAST_PROSE, NO_LANGUAGE, _identifier, language_filter, prose
from llmfusion.study.schema.data import LANGUAGES

FOREIGN = [
    "¿Cuál es la capital de Francia?",
    "Escribe una función en Python que sume dos números enteros.",
    "Hola, como estas? Necesito ayuda con mi tarea de historia sobre la revolucion mexicana.",
    "Resuelve la ecuación $2x + 3 = 11$. Primero restamos 3 en ambos lados. La respuesta es $\\boxed{4}$.",
    "Quelle est la capitale de l'Espagne ?",
    "Écris une fonction Python qui additionne deux nombres.\n```python\ndef add(a, b):\n    return a + b\n```",
    "Was ist die Hauptstadt von Frankreich?",
    "Ein Zug verlässt Berlin um acht Uhr. Wann kommt er in Hamburg an, wenn er 120 km/h fährt?",
    "Qual è la capitale della Francia?",
    "Qual é a capital da França?",
    "Wat is de hoofdstad van Frankrijk?",
    "法国的首都是什么？",
    "Какая столица Франции?",
]
ENGLISH = [
    "What is the capital of France?",
    "Paris.",
    "2 + 2 = 4",
    "yes",
    "Tom has 5 apples and gets 3 more. How many apples does Tom have?\n5 + 3 = 8\n#### 8",
    "Compute $\\int_0^1 x^2 dx$.\n\\[\\int_0^1 x^2\\,dx = \\frac{1}{3}\\]\nThe answer is $\\boxed{\\frac13}$.",
    "Write a function to sum two ints\n```python\ndef add(a: int, b: int) -> int:\n    return a + b\n```",
    'def f(x):\n    """Return x plus 3."""\n    return x + 3',
    '#include <stdio.h>\nint main(void) { printf("hi\\n"); return 0; }',
    "SELECT name FROM users WHERE age > 30;",
    "x_1 = 3, x_2 = 4, x_3 = 5; mean = 4",
    "import numpy as np\nprint(np.mean([1,2,3]))",
    "Translate 'good morning' into Spanish.\nBuenos días.",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_text_in_another_language_is_not_english(text: str) -> None:
    assert not language_filter(["en"])(text)


@pytest.mark.parametrize("text", ENGLISH)
def test_english_with_code_and_mathematics_is_kept(text: str) -> None:
    assert language_filter(["en"])(text)


def test_several_languages_may_be_asked_for() -> None:
    may_be = language_filter(["de", "es"])
    assert may_be("Was ist die Hauptstadt von Frankreich?")
    assert may_be("¿Cuál es la capital de Francia?")
    assert not may_be("What is the capital of France, and how many people live there?")


def test_prose_is_what_is_neither_code_nor_a_formula() -> None:
    text = "Let $x=1$ and call `f(x)`, then f(x) or a_b:\n```\nreturn x\n```\nSee https://a.b/c \\(y\\) done."
    assert prose(text) == "Let and call then or See done."
    assert prose("\\begin{align}x\\end{align} so ~~~never closed") == "so"


def test_what_is_too_short_to_tell_is_kept() -> None:
    short = "Madrid y Toledo"
    assert len(short.encode()) < LEAST_PROSE
    assert language_filter(["en"])(short)


def test_a_study_may_name_every_language_that_can_be_told_and_no_other() -> None:
    known = {label for label in _identifier().labels if len(label) == 2}
    assert set(LANGUAGES) == known
    assert NO_LANGUAGE in _identifier().labels
