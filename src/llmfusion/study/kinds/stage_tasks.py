"""Items of one test, and its few-shot examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.data_plugins import layouts, task_formats
from llmfusion.study.errors import Key, Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.data import Source, Task, outside_files

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload

# Every table has these columns: no task may be named so.
COLUMNS = ("category", "label", "method", "models", "model", "scale", "average")


class Spec(StepSpec):
    """Where items and examples come from."""

    items: Source
    shots_from: Source | None = None


def declare(graph: ArtifactGraph, task: str) -> Declaration:
    """Tasks have no inputs but the user's own files."""
    entry = graph.study.tasks[task]
    body = {"items": dump(entry.items)} | ({"shots_from": dump(entry.shots_from)} if entry.shots_from else {})
    return Declaration(body, files=outside_files(entry.items) + outside_files(entry.shots_from))


def cost(workload: Workload, spec: Spec, shards: int, task: str) -> Cost:
    """Bytes to download: a thousand an item."""
    size = workload.items(task) * 1000
    return Cost("tasks", (size,), size)


def problems(declared: Declared) -> Iterator[Problem]:
    """Names that a table needs for itself, and where items and examples come from."""
    for key, task in declared.entries("tasks"):
        if key[1] in COLUMNS or str(key[1]).endswith(("_stderr", "_k", "_n")):
            yield Problem(key, "is the name of a column of every table; take another")
        if task.shots and task.shots_from is None:
            yield Problem((*key, "shots_from"), f"is missing: {task.shots} shots must come from somewhere")
        if task.items.kind == "generated" and task.items.form != "test":
            yield Problem((*key, "items", "form"), f"got {task.items.form!r}; a task's items need form: test")
        if task.shots_from is not None and task.shots_from.kind == "generated" and task.shots_from.form != "test":
            yield Problem(
                (*key, "shots_from", "form"), f"got {task.shots_from.form!r}; examples of a task need form: test"
            )
        yield from declared.layout((*key, "items"), task.items, "item")
        yield from _format_problems(key, task)
        yield from declared.layout((*key, "shots_from"), task.shots_from, "item")


def _format_problems(key: Key, task: Task) -> Iterator[Problem]:
    """The layout must give the fields that the format asks for: else the model is asked in vain, after its training."""
    layout = layouts("item").get(getattr(task.items, "layout", ""))
    if layout is None:  # generated items have the fields of their world, another layout is a mistake of its own
        return
    missing = sorted(set(task_formats()[task.format].item_fields) - set(layout.fields))
    if missing:
        name = getattr(task.items, "layout", "")
        fields = f"items of layout {name} have: {', '.join(layout.fields)}"
        yield Problem((*key, "format"), f"{task.format} needs the fields {', '.join(missing)}; {fields}")


KIND = Kind(
    step="tasks",
    recipe=1,
    address="data/tasks/{task}",
    stage="data",
    report_stage="data",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"tasks": lambda assumed: (assumed.light_start, 1 / assumed.download)},
    problems=problems,
    is_source=True,
)
