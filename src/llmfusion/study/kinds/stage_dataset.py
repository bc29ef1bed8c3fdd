"""Samples of one dataset, from the hub, a file, or a generated world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.errors import Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.data import Dataset, outside_files

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """A dataset as the study describes it."""

    dataset: Dataset


def declare(graph: ArtifactGraph, dataset: str) -> Declaration:
    """Datasets have no inputs but the user's own file."""
    entry = graph.study.datasets[dataset]
    return Declaration({"dataset": dump(entry)}, files=outside_files(entry))


def cost(workload: Workload, spec: Spec, shards: int, dataset: str) -> Cost:
    """Bytes to read: those of its own file, else five a token."""
    largest_draw = max((workload.draws(mix).get(dataset, 0) for mix in workload.study.mixes), default=0)
    if rows := workload.rows(spec.dataset):
        size = rows.count * rows.bytes_each
    else:
        size = (getattr(spec.dataset, "rows", None) or largest_draw) * workload.assumed.tokens_per_sample * 5
    return Cost("dataset", (size,), size)


def problems(declared: Declared) -> Iterator[Problem]:
    """A dataset holds samples, not test items."""
    for key, dataset in declared.entries("datasets"):
        if dataset.kind == "generated" and dataset.form == "test":
            yield Problem((*key, "form"), "test items cannot be trained on; use text or chat")
        yield from declared.layout(key, dataset, "sample")


KIND = Kind(
    step="dataset",
    recipe=1,
    address="data/dataset/{dataset}",
    stage="data",
    report_stage="data",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"dataset": lambda assumed: (assumed.light_start, 1 / assumed.download)},
    wanted=lambda study: (f"data/dataset/{name}" for name in study.datasets),
    problems=problems,
    is_source=True,
)
