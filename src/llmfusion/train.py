"""Step ``train``: SFT, SeqKD, knowledge fusion or unified fusion of one model, as its spec says."""

import sys

from llmfusion.artifacts import require
from llmfusion.step import Job, run


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
    from llmfusion.fusion.sources import source_of
    from llmfusion.models.batches import device_of
    from llmfusion.models.loading import load_tokenizer
    from llmfusion.training import sharding
    from llmfusion.training.run import Trainee, train

    spec = job.spec["run"]
    pivot = job.input(f"models/{spec['init']}")
    tokenizer = load_tokenizer(pivot, job.spec.get("chat_template"))
    rows = pivot.facts["vocabulary_size"]
    caches = {name: job.input(f"teachers/{name}/{spec['mix']}") for name in spec.get("teachers", [])}
    teachers = [source_of(name, cache, tokenizer, rows, device_of(), spec["fusion"]) for name, cache in caches.items()]
    mixes = [job.input(f"data/mix/{spec['mix']}"), *(job.input(f"data/generated/{m}/{spec['mix']}") for m in spec.get("generated", []))]
    trainee = Trainee(sharding.load(pivot, spec), tokenizer)  # last: everything that can be refused is refused before
    facts = train(job, trainee, spec, mixes, teachers)
    facts |= trainee.save(job.folder, spec.get("save_dtype", "bfloat16"))
    job.facts.update(facts, license=sorted(set(pivot.licences)))


if __name__ == "__main__":
    sys.exit(run("train", build))
