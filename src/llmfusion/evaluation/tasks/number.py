"""Word problems, answered with a number."""

import re

from llmfusion.evaluation.grading import NUMBER, as_number, last_boxed, normalise
from llmfusion.evaluation.task_format import Item, TaskFormat

MARKED = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def extract(answer: str, item: Item) -> str | None:
    """The number behind the last ``####``, else the last in the last ``\\boxed{}``, else the last of the answer."""
    in_box = normalise(last_boxed(answer) or "").replace("{,}", ",")
    numbers = MARKED.findall(answer) or NUMBER.findall(in_box) or NUMBER.findall(answer)
    return numbers[-1] if numbers else None


def grade(answer: str, item: Item) -> bool:
    """Compared as numbers: 1,000.0 is 1000."""
    number = extract(answer, item)
    return number is not None and as_number(number) == as_number(str(item["answer"]))


FORMAT = TaskFormat(
    doc_to_text="{{ question }}",
    doc_to_target="{{ answer }}",
    version=1.0,
    item_fields={"question": str, "answer": str},
    extract=extract,
    grade=grade,
)
