"""Trained models: SFT, SeqKD, knowledge fusion and unified fusion, as the entry says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmfusion.study.errors import Key, Problem
from llmfusion.study.fusion_targets import target_class, target_names
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import Section, dump
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.settings import Capture
from llmfusion.study.schema.training import TrainedModel, Training

if TYPE_CHECKING:
    from llmfusion.fusion.target import FusionTarget
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Assumptions, Workload

FLOPS_PER_PARAMETER_AND_TOKEN = 6  # 2 forward, 4 backward (Kaplan et al. 2020)


class Captured(Section):
    """What a training expects its caches to be made of: settings of the capture, and each teacher's fingerprint."""

    capture: Capture
    teachers: dict[str, str]


class Spec(StepSpec):
    """A training as the study describes it."""

    run: TrainedModel
    captured: Captured | None = Field(None, description="of a training with teachers")
    projected: list[str] = Field([], description="teachers that have another vocabulary, as the study says")


def declare(graph: ArtifactGraph, trained: str) -> Declaration:
    """Made from its pivot, its mix, generated answers and teacher caches; online teachers are loaded themselves."""
    run = graph.study.models.trained[trained]
    inputs = [f"models/{run.init}", f"data/mix/{run.mix}"]
    inputs += [f"data/generated/{model}/{run.mix}" for model in run.generated]
    inputs += [f"teachers/{model}/{run.mix}" for model in run.teachers]
    inputs += [f"models/{model}" for model in run.teachers] if graph.study.capture.kind == "online" else []
    captured: dict[str, Any] = {}
    if run.teachers:
        fingerprints = {model: graph.fingerprint(f"models/{model}") for model in run.teachers}
        captured = {"captured": {"capture": dump(graph.study.capture, "shards"), "teachers": fingerprints}}
    if others := graph.study.other_vocabularies(run):
        captured["projected"] = others
    return Declaration({"run": dump(run), **captured, **graph.chat_template}, inputs)


def cost(workload: Workload, spec: Spec, shards: int, trained: str) -> Cost:
    """See :func:`training_cost`."""
    return training_cost(workload, "train", f"trained/{trained}", spec.run)


def training_cost(workload: Workload, rates: str, model: str, run: Training) -> Cost:
    """FLOPs of one process, and the same for each cached teacher of the student's vocabulary and of another."""
    parameters = workload.parameters(model)
    active = workload.active_parameters(model)
    teachers = getattr(run, "teachers", [])
    samples = workload.samples(run.mix) * (1 + len(getattr(run, "generated", [])))
    steps = run.steps or (run.epochs or 0) * (samples // run.batch_size)
    tokens = steps * run.batch_size * workload.tokens(run.mix) / run.processes
    online = teachers if workload.study.capture.kind == "online" else []
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * active * tokens
    forward = 2 * tokens * sum(workload.active_parameters(teacher) for teacher in online)  # teachers that are run again
    own_vocabulary = workload.vocabulary(model)
    same = sum(workload.vocabulary(teacher) == own_vocabulary for teacher in teachers)
    other = len(teachers) - same
    longest = workload.study.mixes[run.mix].max_length
    per_pass = (
        max(run.micro_batch_tokens, longest)
        if run.micro_batch_tokens
        else (run.micro_batch_size or run.batch_size // run.processes) * longest
    )
    caches = sum(workload.vocabulary_size(teacher) * workload.hidden_size(teacher) * 4 for teacher in teachers)
    caches += sum(workload.parameters(teacher) for teacher in online) * (
        4 if workload.study.capture.dtype == "float32" else 2
    )
    return Cost(
        rates,
        (flops + forward, flops * same, flops * other),
        disk=parameters * (4 if run.save_dtype == "float32" else 2),
        resume=12 * parameters,  # weights and two moments in float32
        gpu_memory=_state_bytes(workload, model, run)
        + _activation_bytes(workload, model, per_pass, run.activation_checkpointing)
        + caches,
    )


def _state_bytes(workload: Workload, model: str, run: Training) -> float:
    """Bytes of weights, gradients and two moments in one device.

    Of a sharded model: its part, and head, embeddings and one layer gathered.
    """
    size = 2 if run.parameters == "bfloat16" else 4
    state = (2 * size + 8) * workload.parameters(model)  # moments are float32
    if run.sharding != "full":
        return state
    gathered = 2 * workload.vocabulary_size(model) * workload.hidden_size(model) + 12 * workload.hidden_size(model) ** 2
    return state / run.processes + 2 * size * gathered


def _activation_bytes(workload: Workload, model: str, tokens: float, recomputed: bool) -> float:
    """Bytes that a forward pass keeps, and five times the logits.

    34 a token, layer and value of the width (Korthikanti et al. 2022).
    """
    width = workload.hidden_size(model)
    layers = workload.layers(model)
    kept = 2 * width * layers + 34 * width if recomputed else 34 * width * layers  # one layer at a time
    return tokens * (kept + 5 * 4 * workload.vocabulary_size(model) * workload.assumed.response_share)


def training_rates(assumed: Assumptions) -> tuple[float, ...]:
    """Seconds of the start, a FLOP, and a FLOP beside a cached teacher of the same and of another vocabulary."""
    speed = assumed.peak * assumed.mfu
    return (assumed.start, 1 / speed, assumed.teacher_share / speed, assumed.projected_share / speed)


def training_problems(declared: Declared, key: Key, run: Training) -> Iterator[Problem]:
    """The mix and the model that a training names."""
    yield from declared.missing((*key, "mix"), run.mix, declared.mixes, "mix")
    init = getattr(run, "init", None)
    if init is not None:
        yield from declared.missing((*key, "init"), init, declared.models, "model")


def problems(declared: Declared) -> Iterator[Problem]:
    """Teachers, generated answers, and what the fusion target can take."""
    for key, run in declared.entries("models", "trained"):
        yield from training_problems(declared, key, run)
        yield from _source_problems(declared, key, run)
        yield from _tokenizer_problems(declared, key, run)
        if run.generated and run.teachers:
            why = "cannot go with teachers: their caches hold the mix's own answers, not generated ones"
            yield Problem((*key, "generated"), why)
        if run.fusion is not None:
            target = target_class(run.fusion.target)
            yield from _number_problems(key, run, run.fusion, target)
            yield from _target_problems(declared, key, run, run.fusion, target)
            if declared.capture.get("kind") == "topk":
                yield from _top_k_problems(declared, key, run, run.fusion, target)


def _source_problems(declared: Declared, key: Key, run: TrainedModel) -> Iterator[Problem]:
    """Teachers and generators must exist, stand once, and be other models, unless the target takes the pivot."""
    accepts_pivot = run.fusion is not None and target_class(run.fusion.target).accepts_pivot
    for field, sources in (("teachers", run.teachers), ("generated", run.generated)):
        yield from declared.addresses((*key, field), sources)
        yield from declared.repeated((*key, field), sources, "source")
        for i, source in enumerate(sources):
            if source == run.init and not (field == "teachers" and accepts_pivot):
                why = f"{source!r} is the model this one starts from; a source must be another model"
                yield Problem((*key, field, i), why)


def _tokenizer_problems(declared: Declared, key: Key, run: TrainedModel) -> Iterator[Problem]:
    """The mix must keep only samples that fit every teacher."""
    mix = declared.valid.get(("mixes", run.mix))
    for i, teacher in enumerate(run.teachers):
        if mix is not None and teacher in declared.models and teacher not in mix.tokenizers:
            text = f"mix {run.mix!r} does not name {teacher!r} under tokenizers"
            yield Problem((*key, "teachers", i), f"{text}: samples that do not fit the teacher would have no states")


def _number_problems(
    key: Key, run: TrainedModel, fusion: FusionOptions, target: type[FusionTarget]
) -> Iterator[Problem]:
    """The number of teachers that the target can take."""
    count = len(run.teachers)
    most = target.max_teachers
    others = _targets_for(count)
    if most is not None and count > most:
        has = f"has {_count(most)}" if most == target.min_teachers else f"has at most {_count(most)}"
        yield Problem((*key, "fusion", "target"), f"{fusion.target} {has}, {count} are given; use {others}")
    if count < target.min_teachers:
        needs = f"needs {_count(target.min_teachers)}" + ("" if most == target.min_teachers else " or more")
        listed = "one is given" if count == 1 else f"{count} are given"
        yield Problem((*key, "teachers"), f"{fusion.target} {needs}, {listed}; use {others}")


def _count(teachers: int) -> str:
    words = {1: "one", 2: "two", 3: "three"}
    return f"{words.get(teachers, teachers)} teacher{'s' * (teachers != 1)}"


def _targets_for(teachers: int) -> str:
    """Names of the targets that take this many, as a sentence lists them."""
    names = [name for name in target_names() if _takes(target_class(name), teachers)]
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "another number of teachers"


def _takes(target: type[FusionTarget], teachers: int) -> bool:
    return target.min_teachers <= teachers and (target.max_teachers is None or teachers <= target.max_teachers)


def _target_problems(
    declared: Declared, key: Key, run: TrainedModel, fusion: FusionOptions, target: type[FusionTarget]
) -> Iterator[Problem]:
    """Temperatures and vocabularies that the target cannot take."""
    if fusion.temperature != 1 and not target.accepts_temperature:
        text = f"got {fusion.temperature}; {fusion.target} is defined at temperature 1 only"
        yield Problem((*key, "fusion", "temperature"), text)
    if not target.accepts_other_vocabularies:
        for i, teacher in _other_vocabularies(declared, run):
            text = f"{teacher!r} has another vocabulary than {run.init!r}, which {fusion.target} does not take"
            yield Problem((*key, "teachers", i), text)


def _top_k_problems(
    declared: Declared, key: Key, run: TrainedModel, fusion: FusionOptions, target: type[FusionTarget]
) -> Iterator[Problem]:
    """What the k most likely tokens of a teacher cannot serve."""
    instead = "Use kind hidden or online"
    if target.topk_refusal is not None:
        why = f"{fusion.target} {target.topk_refusal}; capture.kind topk keeps the k most likely tokens"
        yield Problem((*key, "fusion", "target"), f"{why}. {instead}")
    if fusion.temperature != 1:
        why = f"got {fusion.temperature}; the k most likely tokens of capture.kind topk are known at temperature 1 only"
        yield Problem((*key, "fusion", "temperature"), f"{why}. {instead}")
    for i, teacher in _other_vocabularies(declared, run):
        why = (
            f"{teacher!r} has another vocabulary than {run.init!r}: cross-model attention (DSKD) needs its states, "
            "which capture.kind topk does not keep"
        )
        yield Problem((*key, "teachers", i), f"{why}. {instead}")


def _other_vocabularies(declared: Declared, run: TrainedModel) -> Iterator[tuple[int, str]]:
    """Numbers and names of the teachers that are known to have another vocabulary than the student."""
    own = declared.vocabulary(run.init)
    for i, teacher in enumerate(run.teachers):
        other = declared.vocabulary(teacher) if teacher in declared.models else None
        if own is not None and other is not None and own != other:
            yield i, teacher


KIND = Kind(
    step="train",
    recipe=2,
    address="models/trained/{trained}",
    stage="models",
    report_stage="trainings",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"train": training_rates},
    wanted=lambda study: (f"models/trained/{name}" for name in study.models.trained),
    problems=problems,
    gpus=lambda spec, shards: spec.run.processes,
    is_fusion=True,
)
