"""SFT, SeqKD, knowledge fusion or unified fusion of one model, as its spec says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited, licence_lines
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.study.kinds.train_model import Spec
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.training import TrainedModel, Training

if TYPE_CHECKING:
    from llmfusion.fusion.teacher import Teacher
    from llmfusion.training.loop import Student


def build(job: Job) -> None:
    """Refuse what can be refused, then :func:`train` in as many processes as the model asks for."""
    run = job.parse(Spec).run
    job.facts["license"] = inherited(job.inputs)
    require_disk_of_training(job, job.input(f"models/{run.init}").facts["parameters"], run)
    call_in_processes(job, run, "llmfusion.steps.train_model", train)


def require_disk_of_training(job: Job, parameters: int, run: Training) -> None:
    """Raise :class:`~llmfusion.errors.UserError` where checkpoint or first resume state does not fit on the disk."""
    from llmfusion.training.resume_state import checkpoint_bytes, first_state_bytes, warn_of_few_states

    state = job.work / "state"
    model = f"a model of {parameters:,} parameters ({run.save_dtype})"
    job.require_disk(model, checkpoint_bytes(parameters, run.save_dtype))
    job.require_disk(f"resume state for {parameters:,} parameters", 0, first_state_bytes(parameters, state))
    warn_of_few_states(parameters, state)


def call_in_processes(job: Job, run: Training, module: str, train_job: Callable[[Job], None]) -> None:
    """Run ``train_job(job)`` here, or ``module``'s ``train`` in the processes that share the run.

    Their facts and measurements become the job's.
    """
    if run.processes == 1:
        train_job(job)
        return
    from llmfusion.training.launch import run_processes

    entry = "llmfusion.steps.train_model:train_in_process"
    result = run_processes(entry, run.processes, {"module": module, "job": job.to_json()}, job.work)
    job.facts.update(result["facts"])
    job.start_seconds = result["start_seconds"]
    job.measured = result["measured"]


def train_in_process(state: dict[str, Any]) -> dict[str, Any]:
    """One of several processes: build the same job, train, and return what the starting process needs to publish."""
    job = Job.from_json(state["job"])
    import_module(state["module"]).train(job)
    return {"facts": job.facts, "start_seconds": job.start_seconds, "measured": job.measured}


def train(job: Job) -> None:
    """Train from ``init`` on the mix (and on generated answers), with the cached teachers; save a complete checkpoint.

    Of several processes the first writes.
    """
    from llmfusion.models.loading import load_tokenizer, require_linear_head
    from llmfusion.training import distributed, sharding
    from llmfusion.training.loop import Student

    spec = job.parse(Spec)
    run = spec.run
    pivot = job.input(f"models/{run.init}")
    tokenizer = load_tokenizer(pivot, spec.chat_template)
    teachers = [_load_teacher(job, spec, name, tokenizer, pivot.facts["vocabulary_size"]) for name in run.teachers]
    _require_declared_vocabularies(spec, teachers)
    mixes = [job.input(f"data/mix/{run.mix}")]
    mixes += [job.input(f"data/generated/{model}/{run.mix}") for model in run.generated]
    student = Student(sharding.load(pivot, run), tokenizer)  # last: everything that can be refused is refused before
    require_linear_head(student.model.config, pivot.folder)
    run_training(job, student, run, run.fusion, mixes, teachers)
    if distributed.rank() == 0:
        _finish(job, run, pivot, mixes[0])


def run_training(
    job: Job,
    student: Student,
    run: Training,
    fusion: FusionOptions | None,
    mixes: Sequence[Artifact],
    teachers: Sequence[Teacher],
) -> None:
    """Train; save checkpoint and ``metrics.jsonl`` into the job's folder. Facts and measurements become the job's."""
    from llmfusion.training import distributed
    from llmfusion.training.loop import train as train_student
    from llmfusion.training.save_deadline import TimeLimit

    limit = None if job.time_limit_minutes is None else TimeLimit(job.time_limit_minutes, job.began)
    result = train_student(student, run, fusion, mixes, teachers, job.work / "state", job.key, limit, job.mark_started)
    if distributed.rank() == 0:
        with open(job.folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in result.records)
    job.measured = {"training": result.measured}
    job.facts.update(result.facts | student.save(job.folder, run.save_dtype))


def _finish(job: Job, run: TrainedModel, pivot: Artifact, mix: Artifact) -> None:
    """What a checkpoint has besides its weights: the pivot's generation settings as they are, and a card."""
    from llmfusion.training.card import write_training_card

    settings = "generation_config.json"
    if settings in pivot.manifest["files"]:
        shutil.copyfile(pivot.file(settings), job.folder / settings)
    datasets = list(mix.facts.get("datasets", {}))
    write_training_card(job.folder, run, job.facts, datasets, licence_lines(job.facts["license"]))


def _require_declared_vocabularies(spec: Spec, teachers: Sequence[Teacher]) -> None:
    """Raise :class:`~llmfusion.errors.UserError` for a teacher that would be projected although its word says not."""
    from llmfusion.fusion.teacher import ProjectedTeacher

    projected = {teacher.name for teacher in teachers if isinstance(teacher, ProjectedTeacher)}
    for name in sorted(projected - set(spec.projected)):
        raise UserError(
            f"teacher {name}: its tokenizer differs from that of {spec.run.init}, but the study gives both the same "
            "word under vocabulary; give it another word there (llmfusion check names the line), and it is projected "
            "into the student's space (DSKD)"
        )


def _load_teacher(job: Job, spec: Spec, name: str, tokenizer: Any, vocabulary_size: int) -> Teacher:
    """A teacher from its cache, which must be of this very teacher; loaded itself where the cache holds no states."""
    from llmfusion.fusion.teacher import load_teacher
    from llmfusion.models.batches import default_device
    from llmfusion.teachers.fingerprint import require_same
    from llmfusion.teachers.online import online_source

    mix = spec.run.mix
    samples = job.input(f"data/mix/{mix}")
    cache = job.input(f"teachers/{name}/{mix}")
    model = job.inputs.get(f"models/{name}")
    assert spec.captured is not None
    assert spec.run.fusion is not None
    require_same(name, cache, samples, spec.captured, spec.chat_template, model)
    source = online_source(name, cache, samples, model, default_device())
    return load_teacher(name, cache, tokenizer, vocabulary_size, default_device(), spec.run.fusion, source)
