"""Mathematics, answered in the last ``\\boxed{}``."""

from llmfusion.evaluation.grading import last_boxed, normalise
from llmfusion.evaluation.task_format import Item, TaskFormat


def extract(answer: str, item: Item) -> str | None:
    """Content of the last ``\\boxed{}``."""
    return last_boxed(answer)


def grade(answer: str, item: Item) -> bool:
    """The last box equals the reference after the normalisation of Hendrycks et al. (2021)."""
    boxed = last_boxed(answer)
    return boxed is not None and normalise(boxed) == normalise(item["answer"])


FORMAT = TaskFormat(
    doc_to_text="{{ question }}",
    doc_to_target="{{ answer }}",
    version=1.0,
    item_fields={"question": str, "answer": str},
    extract=extract,
    grade=grade,
)
