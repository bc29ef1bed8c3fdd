"""A source model's own answers to the prompts of a mix (SeqKD)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.settings import Generation

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """Which model answers which mix, and how."""

    model: str
    mix: str
    generation: Generation


def declare(graph: ArtifactGraph, model: str, mix: str) -> Declaration:
    """Made from the model and the mix."""
    body = {"model": model, "mix": mix, "generation": dump(graph.study.generation), **graph.chat_template}
    return Declaration(body, [f"models/{model}", f"data/mix/{mix}"])


def cost(workload: Workload, spec: Spec, shards: int, model: str, mix: str) -> Cost:
    """Parameters times tokens written."""
    samples = workload.samples(mix)
    tokens = workload.tokens(mix)
    written = samples * tokens * workload.assumed.response_share
    batch_tokens = spec.generation.batch_size * workload.study.mixes[mix].max_length
    memory = workload.inference_bytes(model, spec.generation.dtype, batch_tokens)
    return Cost("generate", (workload.active_parameters(model) * written,), samples * tokens * 5, gpu_memory=memory)


KIND = Kind(
    step="generate",
    recipe=2,
    address="data/generated/{model}/{mix}",
    stage="teachers",
    report_stage="generated answers",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"generate": lambda assumed: (assumed.start, 1 / assumed.decoding)},
    gpus=lambda spec, shards: 1,
    is_fusion=True,
)
