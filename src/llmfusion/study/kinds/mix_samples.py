"""Samples drawn from datasets: only what every model's tokenizer can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.errors import Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.data import Mix

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """A mix as the study describes it."""

    mix: Mix


def declare(graph: ArtifactGraph, mix: str) -> Declaration:
    """Made from its datasets, the tests it is compared with, and the models whose tokenizers must hold it."""
    entry = graph.study.mixes[mix]
    inputs = [f"data/dataset/{name}" for name in entry.datasets]
    inputs += [f"data/tasks/{name}" for name in entry.against] + [f"models/{model}" for model in entry.tokenizers]
    return Declaration({"mix": dump(entry), **(graph.chat_template if entry.tokenizers else {})}, inputs)


def cost(workload: Workload, spec: Spec, shards: int, mix: str) -> Cost:
    """Samples through tokenizers."""
    samples = workload.samples(mix)
    return Cost("mix", (samples * (1 + len(spec.mix.tokenizers)),), samples * workload.tokens(mix) * 5)


def problems(declared: Declared) -> Iterator[Problem]:
    """Datasets, tests and models that must exist, and datasets too small for what is asked of them."""
    for key, mix in declared.entries("mixes"):
        for name, count in mix.datasets.items():
            yield from declared.missing((*key, "datasets", name), name, declared.datasets, "dataset")
            rows = getattr(declared.valid.get(("datasets", name)), "rows", None)
            if rows is not None and isinstance(count, int) and rows < count:
                yield Problem((*key, "datasets", name), f"asks for {count} samples of a dataset with {rows} rows")
        for i, name in enumerate(mix.against):
            yield from declared.missing((*key, "against", i), name, declared.tasks, "task")
        yield from declared.addresses((*key, "tokenizers"), mix.tokenizers)


KIND = Kind(
    step="mix",
    recipe=2,
    address="data/mix/{mix}",
    stage="data",
    report_stage="data",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"mix": lambda assumed: (assumed.light_start, 1 / assumed.tokenizing)},
    wanted=lambda study: (f"data/mix/{name}" for name in study.mixes),
    problems=problems,
)
