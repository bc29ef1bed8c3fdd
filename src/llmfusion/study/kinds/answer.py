"""What one model answers to the tasks of a batch; the model is loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmfusion.study.data_plugins import task_formats
from llmfusion.study.errors import Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.data import TaskPrompt
from llmfusion.study.schema.settings import Answering

if TYPE_CHECKING:
    from llmfusion.study.graph import ArtifactGraph
    from llmfusion.study.references import Declared
    from llmfusion.study.workload import Workload


class Spec(StepSpec):
    """Which model is asked which tasks, and how."""

    model: str
    tasks: dict[str, TaskPrompt]
    answering: Answering


def declare(graph: ArtifactGraph, model: str, batch: str) -> Declaration:
    """Made from the model and the staged tasks."""
    tasks = {name: dump(graph.study.tasks[name], "items", "shots_from", "label") for name in graph.study.batches[batch]}
    body = {"model": model, "tasks": tasks, "answering": dump(graph.study.answering), **graph.chat_template}
    return Declaration(body, [f"models/{model}", *(f"data/tasks/{name}" for name in tasks)])


def cost(workload: Workload, spec: Spec, shards: int, model: str, batch: str) -> Cost:
    """Active parameters times tokens: generated ones, and those read, of which a pass takes many at once."""
    assumed = workload.assumed
    written = read = longest = items = 0.0
    formats = task_formats()
    for name, task in spec.tasks.items():
        prompt = workload.prompt_tokens(name)
        answer = 1.0 if formats[task.format].short_answer else assumed.answer_share * task.max_new_tokens
        items += workload.items_asked(name)
        written += workload.items_asked(name) * answer
        read += workload.items_asked(name) * prompt
        longest = max(longest, prompt + task.max_new_tokens)
    active = workload.active_parameters(model)
    memory = workload.inference_bytes(model, spec.answering.dtype, spec.answering.batch_size * longest)
    return Cost("answer", (active * written, 2 * active * read), items * 4000, gpu_memory=memory)


def problems(declared: Declared) -> Iterator[Problem]:
    """Every task is in exactly one batch."""
    batch_of: dict[str, str] = {}
    for key, batch in declared.entries("batches"):
        yield from declared.repeated(key, batch, "task")
        for i, task in enumerate(batch):
            yield from declared.missing((*key, i), task, declared.tasks, "task")
            if batch_of.setdefault(task, str(key[1])) != key[1]:
                yield Problem(
                    (*key, i), f"task {task!r} is already in batch {batch_of[task]!r}; a task is asked in one batch"
                )
    for task in sorted(declared.tasks - set(batch_of)):
        yield Problem(("tasks", task), "is in no batch; add it under batches")


KIND = Kind(
    step="answer",
    recipe=2,
    address="answers/{model}/{batch}",
    stage=None,
    report_stage="answers",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"answer": lambda assumed: (assumed.start, 1 / assumed.decoding, 1 / (assumed.peak * assumed.mfu))},
    problems=problems,
    gpus=lambda spec, shards: 1,
)
