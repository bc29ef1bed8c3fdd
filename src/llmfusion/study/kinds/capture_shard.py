"""A share of a teacher's cache, where the study asks for several jobs; the cache is the same whatever their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llmfusion.study.kinds import Cost, Declaration, Kind
from llmfusion.study.kinds import capture_teacher as whole

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.workload import Workload


class Spec(whole.Spec):
    """The cache's spec, and ``shard``: the share's number from 1, and how many there are."""

    shard: Annotated[list[int], Field(min_length=2, max_length=2)]


def declare(graph: ArtifactGraph, model: str, mix: str, shard: str) -> Declaration:
    """Made from what the whole cache is made from."""
    number, count = map(int, shard.split("-of-"))
    return Declaration(
        {**whole.body_of(graph, model, mix), "shard": [number, count]}, [f"models/{model}", f"data/mix/{mix}"]
    )


def cost(workload: Workload, spec: Spec, shards: int, model: str, mix: str, shard: str) -> Cost:
    """Its share of the pass."""
    return whole.pass_cost(workload, spec, 1 / spec.shard[1])


KIND = Kind(
    step=whole.STEP,
    recipe=whole.RECIPE,
    address="teachers/shards/{model}/{mix}/{shard}",
    stage=None,
    report_stage="teacher caches",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={whole.STEP: whole.capture_rates},
    gpus=lambda spec, shards: 1,
    is_fusion=True,
)
