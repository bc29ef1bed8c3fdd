"""One cell of a table: a model on a task, graded from stored answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfusion.study.data_plugins import task_formats
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """Which answers are graded, and how."""

    model: str
    task: str
    format: str
    batch: str
    scale: str
    limit: int | None = None  # items that are asked where these are not all


def declare(graph: ArtifactGraph, model: str, task: str) -> Declaration:
    """Made from the stored answers and the staged task."""
    batch = next(name for name, tasks in graph.study.batches.items() if task in tasks)
    body: dict[str, Any] = {
        "model": model,
        "task": task,
        "format": graph.study.tasks[task].format,
        "batch": batch,
        "scale": graph.study.scale,
    }
    body |= {"limit": graph.study.tasks[task].limit} if graph.study.tasks[task].limit else {}
    return Declaration(body, [f"answers/{model}/{batch}", f"data/tasks/{task}"])


def cost(workload: Workload, spec: Spec, shards: int, model: str, task: str) -> Cost:
    """Items, and items whose programs are run."""
    items = workload.items_asked(task)
    return Cost("score", (items, items if task_formats()[spec.format].runs_programs else 0.0), items * 200)


KIND = Kind(
    step="score",
    recipe=2,
    address="scores/{model}/{task}",
    stage="scores",
    report_stage="scores",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"score": lambda assumed: (assumed.light_start, 0.1 / assumed.grading, 1 / assumed.grading)},
    wanted=lambda study: (f"scores/{model}/{task}" for model in study.model_addresses() for task in study.tasks),
)
