"""Base models: staged from the hub, a folder or a GGUF file, or trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.errors import Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.kinds.train_model import training_cost, training_problems, training_rates
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.base_models import SIZE_KEYS, BaseModelEntry, ScratchModel, model_files

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """A base model as the study describes it."""

    base: BaseModelEntry


def declare(graph: ArtifactGraph, base: str) -> Declaration:
    """One that is trained here needs its mix, and the base model it starts from."""
    entry = graph.study.models.base[base]
    inputs = [f"data/mix/{entry.mix}"] if isinstance(entry, ScratchModel) else []
    inputs += [f"models/{entry.init}"] if isinstance(entry, ScratchModel) and entry.init else []
    return Declaration({"base": dump(entry, *SIZE_KEYS), **graph.chat_template}, inputs, model_files(entry))


def cost(workload: Workload, spec: Spec, shards: int, base: str) -> Cost:
    """A training, or bytes to download or convert."""
    if isinstance(spec.base, ScratchModel):
        return training_cost(workload, "pretrain", f"base/{base}", spec.base)
    return Cost("base", (workload.weight_bytes(f"base/{base}"),), workload.bytes_to_stage(f"base/{base}"))


def problems(declared: Declared) -> Iterator[Problem]:
    """What a model trained from scratch starts from."""
    for key, entry in declared.entries("models", "base"):
        if not isinstance(entry, ScratchModel):
            continue
        yield from training_problems(declared, key, entry)
        if entry.init is not None and not entry.init.startswith("base/"):
            yield Problem((*key, "init"), f"got {entry.init!r}; a base model can start only from another base model")


KIND = Kind(
    step="base",
    recipe=1,
    address="models/base/{base}",
    stage="models",
    report_stage="base models",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"base": lambda assumed: (assumed.start, 1 / assumed.download), "pretrain": training_rates},
    wanted=lambda study: (f"models/base/{name}" for name in study.models.base),
    problems=problems,
    gpus=lambda spec, shards: spec.base.processes if isinstance(spec.base, ScratchModel) else 0,
    is_source=True,
)
