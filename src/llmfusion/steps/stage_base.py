"""Stage a base model (hub, folder, GGUF) or train it from scratch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llmfusion import ROOT
from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited
from llmfusion.models import staging
from llmfusion.study.kinds.stage_base import Spec
from llmfusion.study.schema.base_models import GgufModel, HubModel, PathModel, ScratchModel
from llmfusion.study.sizes import size_of_gguf

if TYPE_CHECKING:
    from llmfusion.training.loop import Student

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Fill the folder with a complete checkpoint."""
    spec = job.parse(Spec)
    if isinstance(spec.base, ScratchModel):
        _train(job, spec.base)
    else:
        job.facts.update(_stage(job, spec.base, spec.chat_template))
    logger.info("%s, %s parameters", job.facts["architecture"], f"{job.facts['parameters']:,}")


def _stage(job: Job, base: HubModel | PathModel | GgufModel, chat_template: str | None) -> dict[str, Any]:
    """Stage a model that is not trained here. Returns its facts."""
    if isinstance(base, HubModel):
        facts = staging.stage_hub(base, job.folder, chat_template)
    elif isinstance(base, GgufModel):
        job.restrict_to_readers_of(ROOT / base.path)
        job.require_disk(f"{base.path} in float32", int(size_of_gguf(ROOT / base.path).bytes or 0))
        return staging.stage_gguf(base, job.folder, chat_template)
    else:
        job.restrict_to_readers_of(ROOT / base.path)
        _require_disk(job, base)
        facts = staging.stage_folder(base, job.folder, chat_template)
    for path in job.folder.iterdir():  # links and copies have the rights of their sources
        job.restrict_to_readers_of(path)
    return facts


def _require_disk(job: Job, base: PathModel) -> None:
    """Raise :class:`UserError` where the folder's files do not fit on the disk; links take no room."""
    draft = job.folder.stat()
    files = [path.stat() for path in staging.taken_files(ROOT / base.path)]
    copied = sum(file.st_size for file in files if (file.st_dev, file.st_uid) != (draft.st_dev, draft.st_uid))
    job.require_disk(f"a copy of {base.path}", copied)


def _train(job: Job, run: ScratchModel) -> None:
    """Train from random weights, or from another base model, whose size is known before it is loaded."""
    from llmfusion.steps.train_model import call_in_processes, require_disk_of_training

    job.facts["license"] = inherited(job.inputs)
    if run.init is not None:
        require_disk_of_training(job, job.input(f"models/{run.init}").facts["parameters"], run)
    call_in_processes(job, run, "llmfusion.steps.stage_base", train)


def train(job: Job) -> None:
    """Train on every token of raw texts and on the responses of questions; of several processes the first writes."""
    from llmfusion.steps.train_model import run_training

    spec = job.parse(Spec)
    run = spec.base
    assert isinstance(run, ScratchModel)
    mix = job.input(f"data/mix/{run.mix}")
    run_training(job, _student(job, spec, run), run, None, [mix], [])


def _student(job: Job, spec: Spec, run: ScratchModel) -> Student:
    """The model to train, with its tokenizer: another base model, or one with random weights."""
    from llmfusion.models.loading import load_tokenizer
    from llmfusion.models.scratch import make_model, make_tokenizer
    from llmfusion.training import sharding
    from llmfusion.training.loop import Student

    if run.init is not None:
        parent = job.input(f"models/{run.init}")
        return Student(sharding.load(parent, run), load_tokenizer(parent, spec.chat_template))
    assert run.tokenizer is not None
    assert run.architecture is not None
    samples = job.input(f"data/mix/{run.mix}").file("samples.jsonl")
    tokenizer = make_tokenizer(run.tokenizer, samples, spec.chat_template)
    return Student(make_model(run.architecture, tokenizer, run.seed), tokenizer)
