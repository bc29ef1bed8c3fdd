"""Merged models: the parents' deltas over their pivot, by one of the merge methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.errors import Key, Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.merging import Merge
from llmfusion.study.schema.options import MergeOptions

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """A merge as the study describes it."""

    merge: Merge


def declare(graph: ArtifactGraph, merged: str) -> Declaration:
    """Made from the pivot and the parents."""
    merge = graph.study.models.merged[merged]
    return Declaration({"merge": dump(merge)}, [f"models/{model}" for model in [merge.pivot, *merge.parents]])


def cost(workload: Workload, spec: Spec, shards: int, merged: str) -> Cost:
    """Parameters times parents."""
    parameters = workload.parameters(f"merged/{merged}")
    return Cost("merge", (parameters * len(spec.merge.parents),), 4 * parameters)


def problems(declared: Declared) -> Iterator[Problem]:
    """Parents that were fine-tuned from the pivot, in full precision, and a weight for each."""
    for key, merge in declared.entries("models", "merged"):
        yield from declared.missing((*key, "pivot"), merge.pivot, declared.models, "model")
        yield from declared.addresses((*key, "parents"), merge.parents)
        yield from declared.repeated((*key, "parents"), merge.parents, "parent")
        for i, address in enumerate(merge.parents):
            yield from _parent_problems((*key, "parents", i), address, merge.pivot, declared)
        weight = getattr(merge, "weight", None)
        if isinstance(weight, list) and len(weight) != len(merge.parents):
            yield Problem(
                (*key, "weight"),
                f"has {len(weight)} values for {len(merge.parents)} parents; give one value, or one each",
            )


def _parent_problems(key: Key, address: str, pivot: str, declared: Declared) -> Iterator[Problem]:
    parent = declared.model(address)
    if address == pivot:
        yield Problem(key, f"{address!r} is the merge's pivot; its delta is zero")
    start = getattr(parent, "init", None) or getattr(parent, "pivot", None)
    if parent is not None and address != pivot and start != pivot:
        origin = f"starts from {start!r}" if start else "was not trained from it"
        yield Problem(key, f"{address!r} {origin}, the merge's pivot is {pivot!r}: deltas need the same start")
    if getattr(parent, "save_dtype", "float32") != "float32":
        yield Problem(
            key,
            f"{address!r} is saved in {parent.save_dtype}, which rounds its delta away; set its save_dtype: float32",
        )


KIND = Kind(
    step="merge",
    recipe=MergeOptions.recipe,
    address="models/merged/{merged}",
    stage="models",
    report_stage="merges",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"merge": lambda assumed: (assumed.light_start, assumed.merging)},
    wanted=lambda study: (f"models/merged/{name}" for name in study.models.merged),
    problems=problems,
)
