"""Items of a staged task, checked for what its format needs."""

from llmfusion.artifacts.store import Artifact
from llmfusion.data.samples import read_items
from llmfusion.errors import DamagedError
from llmfusion.evaluation.task_format import Item, load_format


def items_of(task: Artifact, format_name: str, name: str = "items", limit: int | None = None) -> list[Item]:
    """The items of a staged task (or its ``shots``) that are asked: all, or ``limit`` of them, numbered from 0.

    A limit takes items spread evenly over the file, number ``i * n // limit`` as the i-th, so that a test sorted by
    subject is asked in all of its subjects. Raises :class:`DamagedError` for one its format cannot use, or for too few.
    """
    path = task.file(f"{name}.jsonl")
    task_format = load_format(format_name)
    items = list(read_items(path))
    for number, item in enumerate(items, 1):
        if (problem := task_format.item_problem(format_name, item)) is not None:
            raise DamagedError(f"{path}, line {number}: {problem}")
    if len(items) != task.facts[name]:
        raise DamagedError(f"{path}: expected {task.facts[name]} lines as the manifest tells, found {len(items)}")
    if limit is None or limit >= len(items):
        return items
    return [{**items[i * len(items) // limit], "item": i} for i in range(limit)]
