"""Grade stored answers: one function a task format, each ``(answer text, item) -> right?``. Imports no torch."""

import re
from collections.abc import Callable
from typing import Any

from llmfusion.artifacts.store import Artifact
from llmfusion.data.samples import read_jsonl
from llmfusion.errors import DamagedError

Item = dict[str, Any]
FIELDS: dict[str, dict[str, type]] = {  # what a format's default prompt and grader read
    "letter": {"question": str, "choices": list, "answer": int},
    "number": {"question": str, "answer": str},
    "boxed": {"question": str, "answer": str},
    "code": {"prompt": str, "test": str, "entry_point": str},
}


def items_of(task: Artifact, kind: str, name: str = "items") -> list[Item]:
    """All items of a staged task (or its ``shots``). Raises :class:`DamagedError` for one its format cannot use, or for too few."""
    file = task.file(f"{name}.jsonl")
    items = list(read_jsonl(file))
    for number, item in enumerate(items, 1):
        if (wrong := _wrong(item, kind)) is not None:
            raise DamagedError(f"{file}, line {number}: {wrong}")
    if len(items) != task.facts[name]:
        raise DamagedError(f"{file}: expected {task.facts[name]} lines as the manifest tells, found {len(items)}")
    return items


def _wrong(item: Item, kind: str) -> str | None:
    for key, expected in FIELDS.get(kind, {}).items():
        if not isinstance(item.get(key), expected):
            return f"{key}: a task of format {kind!r} needs {expected.__name__}, found {item.get(key)!r:.60}"
    if kind == "letter" and not 0 <= item["answer"] < len(item["choices"]) <= 10:
        return (
            f"answer: expected the number of one of {len(item['choices'])} choices (10 at most), found {item['answer']}"
        )
    return None


def letter(text: str, item: Item) -> bool:
    """Whether the right choice was named: by its letter after the last "answer is"; else by the first letter that stands
    alone at a line's start or behind a colon at its end (``B``, ``(B)``, ``B. blue``, ``Answer: B``); else by its text alone."""
    text = text.replace("*", "")  # bold
    said = re.findall(r"(?i:answer is):?\s*\(?([A-J])\b", text)
    alone = re.findall(r"(?:^|:)\s*\(?([A-J])(?:[.)]|\s*$)", text, re.MULTILINE)
    found = said[-1] if said else alone[0] if alone else None
    if found is None:
        return text.strip().lower() == str(item["choices"][item["answer"]]).strip().lower()
    return found == "ABCDEFGHIJ"[item["answer"]]


def number(text: str, item: Item) -> bool:
    """The number behind ``####``, else the last one in the last ``\\boxed{}``, else the last one of the answer, compared as numbers."""
    marked = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    in_box = NUMBER.findall(normalise(last_boxed(text) or "").replace("{,}", ","))
    found = marked[-1:] or in_box[-1:] or NUMBER.findall(text)[-1:]
    return bool(found) and _value(found[0]) == _value(str(item["answer"]))


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def _value(text: str) -> float | str:
    cleaned = text.replace(",", "").replace("$", "").strip().rstrip(".")
    try:
        return float(cleaned)
    except ValueError:
        return cleaned


def boxed(text: str, item: Item) -> bool:
    """The last ``\\boxed{}`` equals the reference after the normalisation of Hendrycks et al. (2021)."""
    found = last_boxed(text)
    return found is not None and normalise(found) == normalise(item["answer"])


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (or ``\\fbox``), braces balanced; None if there is none or it never closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed", 1)[-1] if text[start:].startswith("\\boxed") else text[start + 5 :]
    if rest.startswith(" "):
        words = rest.strip().split("$")[0].split()
        return words[0] if words else None
    if not rest.startswith("{"):
        return None
    depth = 0
    for i, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:i]
    return None


def normalise(answer: str) -> str:
    """LaTeX answers in one spelling: no spaces, units, signs or text wrappers; fractions and roots with braces; 0.5 as 1/2."""
    text = (
        answer.replace("\n", "")
        .replace("\\!", "")
        .replace("\\\\", "\\")
        .replace("tfrac", "frac")
        .replace("dfrac", "frac")
    )
    text = (
        text.replace("\\left", "")
        .replace("\\right", "")
        .replace("^{\\circ}", "")
        .replace("^\\circ", "")
        .replace("\\$", "")
    )
    text = re.split(r"\\text\{ ", text)[0] if "\\text{ " in text else text
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    return {"0.5": "\\frac{1}{2}", "-0.5": "-\\frac{1}{2}"}.get(text, text).rstrip(".")


def program(text: str, item: Item) -> str:
    """The code of an answer to a completion task: a fenced block if there is one; whole functions replace the prompt.

    Returns what follows the prompt, so that ``prompt + program`` is the complete candidate.
    """
    fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    body = fenced[0] if fenced else text
    if re.search(rf"^def {re.escape(item['entry_point'])}\(", body, re.MULTILINE):
        return "\n    pass\n\n" + body  # the prompt's open function gets a body and is then defined anew
    return body


GRADERS: dict[str, Callable[[str, Item], bool]] = {"letter": letter, "number": number, "boxed": boxed}
