"""A teacher's cache over a mix: its final hidden states, or its most likely tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.settings import Capture

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.workload import Assumptions, Workload

STEP = "capture"
RECIPE = 3


class Spec(StepSpec):
    """Which model is captured over which mix, and how."""

    model: str
    mix: str
    capture: Capture


def body_of(graph: ArtifactGraph, model: str, mix: str) -> dict[str, Any]:
    """The spec of a cache, which does not depend on the number of shards."""
    return {"model": model, "mix": mix, "capture": dump(graph.study.capture, "shards"), **graph.chat_template}


def declare(graph: ArtifactGraph, model: str, mix: str) -> Declaration:
    """Made from the model and the mix; where several jobs share the pass, it waits for their shards.

    Shards do not change the cache or its spec: caches that are there stay when their number is changed.
    """
    inputs = [f"models/{model}", f"data/mix/{mix}"]
    body = body_of(graph, model, mix)
    made_in = graph.shards_made(f"teachers/{model}/{mix}", STEP, RECIPE, body, inputs)
    count = made_in or graph.study.capture.shards
    shards = [f"teachers/shards/{model}/{mix}/{i}-of-{count}" for i in range(1, count + 1)] if count > 1 else []
    return Declaration(body, inputs, shards=shards)


def state_bytes(capture: Capture, hidden_size: float) -> float:
    """Bytes of one hidden state of a teacher of this width, and of a row of its head."""
    return hidden_size * _value_bytes(capture)


def _value_bytes(capture: Capture) -> int:
    return 4 if capture.dtype == "float32" else 2


def row_bytes(capture: Capture, hidden_size: float) -> float:
    """Bytes of a row of a cache of a teacher of this width: 2d + 16 for hidden states in bfloat16."""
    return 16 + {"hidden": state_bytes(capture, hidden_size), "topk": 8 * capture.k + 4, "online": 0}[capture.kind]


def cache_bytes(workload: Workload, spec: Spec) -> float:
    """Bytes of a teacher cache: rows, head and embeddings."""
    rows = workload.samples(spec.mix) * workload.tokens(spec.mix) * workload.assumed.response_share
    hidden_size = workload.hidden_size(spec.model)
    head = workload.vocabulary_size(spec.model) * state_bytes(spec.capture, hidden_size)
    return rows * row_bytes(spec.capture, hidden_size) + 2 * head


def pass_cost(workload: Workload, spec: Spec, share: float) -> Cost:
    """FLOPs of a forward pass over a ``share`` of the mix."""
    parameters = workload.parameters(spec.model)
    hidden_size = workload.hidden_size(spec.model)
    tokens = workload.samples(spec.mix) * workload.tokens(spec.mix) * share
    batch = spec.capture.batch_size * workload.study.mixes[spec.mix].max_length
    memory = (
        _value_bytes(spec.capture) * parameters
        + 4 * workload.vocabulary_size(spec.model) * hidden_size
        + batch * hidden_size * 20
    )
    flops = 2 * workload.active_parameters(spec.model) * tokens
    return Cost(STEP, (flops,), cache_bytes(workload, spec) * share, gpu_memory=memory)


def cost(workload: Workload, spec: Spec, shards: int, model: str, mix: str) -> Cost:
    """A forward pass; after shards, every byte read twice: when they are verified, and when the cache is hashed."""
    if shards:
        return Cost("assemble", (2 * cache_bytes(workload, spec),), 0)
    return pass_cost(workload, spec, 1.0)


def capture_rates(assumed: Assumptions) -> tuple[float, ...]:
    """Seconds of the start, and a FLOP."""
    return (assumed.start, 1 / (assumed.peak * assumed.mfu))


KIND = Kind(
    step=STEP,
    recipe=RECIPE,
    address="teachers/{model}/{mix}",
    stage="teachers",
    report_stage="teacher caches",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={STEP: capture_rates, "assemble": lambda assumed: (assumed.light_start, 1 / assumed.hashing)},
    gpus=lambda spec, shards: 0 if shards else 1,
    is_fusion=True,
)
