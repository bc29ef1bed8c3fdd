"""Step ``train``: SFT, SeqKD, knowledge fusion or unified fusion of one model, as its spec says."""

import shutil
import sys
from typing import TYPE_CHECKING, Any

from llmfusion.artifacts import Artifact, require
from llmfusion.step import Job, run

if TYPE_CHECKING:
    from llmfusion.fusion.sources import Source


def build(job: Job) -> None:
    """Refuse what can be refused, then :func:`make` in as many processes as the model asks for."""
    from llmfusion.fusion.objective import NAMES
    from llmfusion.training import checkpoint
    from llmfusion.training.launch import in_processes

    spec = job.spec["run"]
    target = spec.get("fusion", {}).get("target", "kd")
    require(target in NAMES, f"there is no fusion target {target!r}; there are: {', '.join(NAMES)}")
    checkpoint.need(job, job.input(f"models/{spec['init']}").facts["parameters"], spec.get("save_dtype", "bfloat16"))
    in_processes(job, spec.get("processes", 1), "llmfusion.train")


def make(job: Job) -> None:
    """Train from ``init`` on the mix (and on generated answers), with the cached teachers; save a complete checkpoint.

    Of several processes the first writes.
    """
    from llmfusion.models.loading import load_tokenizer, require_linear_head
    from llmfusion.training import distributed, sharding
    from llmfusion.training.run import Trainee, train

    spec = job.spec["run"]
    pivot = job.input(f"models/{spec['init']}")
    tokenizer = load_tokenizer(pivot, job.spec.get("chat_template"))
    teachers = [_teacher(job, name, tokenizer, pivot.facts["vocabulary_size"]) for name in spec.get("teachers", [])]
    mixes = [job.input(f"data/mix/{spec['mix']}"), *(job.input(f"data/generated/{m}/{spec['mix']}") for m in spec.get("generated", []))]
    trainee = Trainee(sharding.load(pivot, spec), tokenizer)  # last: everything that can be refused is refused before
    require_linear_head(trainee.model.config, pivot.folder)
    facts = train(job, trainee, spec, mixes, teachers)
    facts |= trainee.save(job.folder, spec.get("save_dtype", "bfloat16"))
    job.facts.update(facts, license=sorted(set(pivot.licences)))
    if distributed.rank() == 0:
        _finish(job, spec, pivot, mixes[0])


def _finish(job: Job, spec: dict[str, Any], pivot: Artifact, mix: Artifact) -> None:
    """What a checkpoint has besides its weights: the pivot's generation settings as they are, and a card."""
    from llmfusion.models.card import write_training_card

    settings = "generation_config.json"
    if settings in pivot.manifest["files"]:
        shutil.copyfile(pivot.file(settings), job.folder / settings)
    write_training_card(job.folder, spec, job.facts, list(mix.facts.get("datasets", {})), job.facts["license"])


def _teacher(job: Job, name: str, tokenizer: Any, rows: int) -> "Source":
    """A teacher from its cache, which must be the one that was asked for; in memory itself where the cache holds no states."""
    from llmfusion.fusion.sources import source_of
    from llmfusion.models.batches import device_of
    from llmfusion.teachers.fingerprint import require_same
    from llmfusion.teachers.online import states_of

    mix = job.spec["run"]["mix"]
    samples, cache, model = job.input(f"data/mix/{mix}"), job.input(f"teachers/{name}/{mix}"), job.inputs.get(f"models/{name}")
    require_same(name, cache, samples, job.spec, model)
    states = states_of(name, cache, samples, model, device_of())
    return source_of(name, cache, tokenizer, rows, device_of(), job.spec["run"]["fusion"], states)


if __name__ == "__main__":
    sys.exit(run("train", build))
