"""Tables: models against tasks, and the methods that the rows stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmfusion.study.errors import Problem, nearest
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.schema.data import Task
    from llmfusion.study.schema.study import Study
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """The rows and columns, and the fingerprint of every cell that the study asks for."""

    title: str
    scale: str
    tasks: list[list[str]]  # [name, label]
    rows: list[list[Any]]  # [models, category, label, method, sources]
    cells: dict[str, dict[str, str]]  # model: {task: first 16 digits of the fingerprint}
    reference: str | None = None


def declare(graph: ArtifactGraph, table: str) -> Declaration:
    """Made from its cells."""
    entry = graph.study.tables[table]
    models = [model for row in entry.rows for model in row.models]
    cells = {
        model: {task: graph.fingerprint(f"scores/{model}/{task}")[:16] for task in entry.tasks} for model in models
    }
    rows = [[row.models, row.category, row.label, *describe(graph.study, row.models[0])] for row in entry.rows]
    tasks = [[task, _column_label(graph.study.tasks[task])] for task in entry.tasks]
    body = {"title": graph.study.title, "scale": graph.study.scale, "tasks": tasks, "rows": rows, "cells": cells}
    body |= {"reference": entry.reference} if entry.reference else {}
    return Declaration(body, [f"scores/{model}/{task}" for model in models for task in entry.tasks])


def _column_label(task: Task) -> str:
    """The label of a task, with its limit: a score on some items is not one on all."""
    return f"{task.label}, {task.limit} items" if task.limit else task.label


def describe(study: Study, model: str) -> tuple[str, str]:
    """``(method, sources)`` of a table row, from the entry itself: e.g. ``("pairwise-rsaf", "code+math")``."""
    kind, name = model.split("/")
    if kind == "base":
        return "none", name
    if kind == "merged":
        merge = study.models.merged[name]
        sources = [source for parent in merge.parents for source in describe(study, parent)[1].split("+")]
        return f"pairwise-{merge.method}", "+".join(dict.fromkeys(sources))
    run = study.models.trained[name]
    if run.fusion is None:
        return ("seqkd" if run.generated else "sft"), "+".join(m.split("/")[1] for m in run.generated or [run.init])
    sources = [m.split("/")[1] for m in run.teachers if m != run.init]
    return run.fusion.target if len(sources) == 1 else f"unified-{run.fusion.target}", "+".join(sources)


def cost(workload: Workload, spec: Spec, shards: int, table: str) -> Cost:
    """Cells."""
    return Cost("table", (float(sum(len(tasks) for tasks in spec.cells.values())),), 1e5)


def problems(declared: Declared) -> Iterator[Problem]:
    """Rows and columns that must exist, each once, with equally many replicates."""
    for key, table in declared.entries("tables"):
        if key[1] == "cost":
            yield Problem(key, "is the name of the report of costs, results/cost.csv; take another")
        if str(key[1]).endswith(".cost"):
            other = str(key[1]).removesuffix(".cost")
            yield Problem(key, f"is the name of the costs of a table {other!r}, results/{key[1]}.csv; take another")
        yield from declared.repeated((*key, "tasks"), table.tasks, "task")
        for i, task in enumerate(table.tasks):
            yield from declared.missing((*key, "tasks", i), task, declared.tasks, "task")
        seen: set[str] = set()
        for i, row in enumerate(table.rows):
            for model in row.models:
                yield from declared.missing((*key, "rows", i, "model"), model, declared.models, "model")
                if model in seen:
                    yield Problem((*key, "rows", i, "model"), f"model {model!r} has a row already")
                seen.add(model)
            if len(row.models) != len(table.rows[0].models):
                counts = f"has {len(row.models)} replicates, the first row {len(table.rows[0].models)}"
                text = f"{counts}: rows of a table are compared replicate by replicate"
                yield Problem((*key, "rows", i, "model"), text)
        if table.reference is not None and table.reference not in seen:
            text = f"{table.reference!r} has no row in this table; {nearest(table.reference, seen)}"
            yield Problem((*key, "reference"), text)


KIND = Kind(
    step="table",
    recipe=2,
    address="tables/{table}",
    stage="tables",
    report_stage="scores",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"table": lambda assumed: (assumed.light_start, 1e-4)},
    wanted=lambda study: (f"tables/{name}" for name in study.tables),
    problems=problems,
    is_local=True,
)
