"""Multiple choice, answered with a letter."""

import re

from llmfusion.evaluation.task_format import Item, TaskFormat

LETTERS = "ABCDEFGHIJ"
ANSWER_IS = re.compile(r"(?i:answer is):?\s*\(?([A-J])\b")
ALONE = re.compile(r"(?:^|:)\s*\(?([A-J])(?:[.)]|\s*$)", re.MULTILINE)


def check_item(item: Item) -> str | None:
    """The answer is the index of one of at most ten choices."""
    choices = len(item["choices"])
    if 0 <= item["answer"] < choices <= len(LETTERS):
        return None
    return f"answer: expected the number of one of {choices} choices (10 at most), found {item['answer']}"


def extract(answer: str, item: Item) -> str | None:
    """The letter after the last "answer is".

    Else the first letter that stands alone at a line's start or behind a colon at its end (``B``, ``(B)``, ``B. blue``,
    ``Answer: B``); else that of the choice whose text is the whole answer.
    """
    text = answer.replace("*", "")  # bold
    if named := ANSWER_IS.findall(text):
        return named[-1]
    if alone := ALONE.findall(text):
        return alone[0]
    choices = [str(choice).strip().lower() for choice in item["choices"]]
    indices = [item["answer"], *range(len(choices))]  # the right one first, should two choices read the same
    return next((LETTERS[i] for i in indices if choices[i] == text.strip().lower()), None)


def grade(answer: str, item: Item) -> bool:
    """Whether the letter is that of the right choice."""
    return extract(answer, item) == LETTERS[item["answer"]]


FORMAT = TaskFormat(
    doc_to_text="{{ question }}{% for choice in choices %}\n{{ 'ABCDEFGHIJ'[loop.index0] }}. {{ choice }}{% endfor %}",
    doc_to_target="{{ 'ABCDEFGHIJ'[answer] }}",
    version=1.0,
    item_fields={"question": str, "choices": list, "answer": int},
    check_item=check_item,
    short_answer=True,
    extract=extract,
    grade=grade,
)
