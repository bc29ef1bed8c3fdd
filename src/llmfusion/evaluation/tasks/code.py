"""Functions to complete, graded by running them in the sandbox."""

import re

from llmfusion.evaluation.task_format import Item, TaskFormat

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program(answer: str, item: Item) -> str:
    """The code of an answer to a completion task: a fenced block if there is one; whole functions replace the prompt.

    Returns what follows the prompt, so that ``prompt + program`` is the complete candidate.
    """
    fenced = FENCED.findall(answer)
    body = fenced[0] if fenced else answer
    if re.search(rf"^def {re.escape(item['entry_point'])}\(", body, re.MULTILINE):
        return "\n    pass\n\n" + body  # the prompt's open function gets a body and is then defined anew
    return body


FORMAT = TaskFormat(
    doc_to_text="{{ prompt.rstrip() }}",
    doc_to_target="{{ entry_point }}",
    version=1.0,
    item_fields={"prompt": str, "test": str, "entry_point": str},
    program=program,
)
