"""Draw samples from datasets, keeping only what every tokenizer can hold."""

import logging
import random
from collections import Counter
from collections.abc import Callable

from llmfusion.artifacts.job import Job
from llmfusion.data.overlap import Overlap
from llmfusion.data.samples import LineIndex, Sample, read_jsonl, text_of, write_jsonl
from llmfusion.data.sources import Rejected
from llmfusion.errors import UserError
from llmfusion.study.kinds.mix_samples import Spec

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``. Rows are visited in a random order and the first that pass are taken, which draws the same
    distribution as filtering everything first. Facts: per dataset asked, visited, taken and rejected by reason; overlap."""
    spec = job.parse(Spec)
    mix = spec.mix
    rng = random.Random(f"mix {mix.seed}")
    overlap = Overlap({t: read_jsonl(job.input(f"data/tasks/{t}").file("items.jsonl")) for t in mix.against})
    reason = _filters(job, spec, overlap)
    taken: list[Sample] = []
    for name, count in sorted(mix.datasets.items()):
        taken += _draw(job, name, count, rng, reason)
    twice = {name for name, times in Counter(s["id"] for s in taken).items() if times > 1}
    if twice:
        datasets = ", ".join(sorted({s["dataset"] for s in taken if s["id"] in twice}))
        raise UserError(
            f"{len(twice)} samples are drawn twice, from the datasets {datasets}, one is {min(twice)}: give each source under one name"
        )
    rng.shuffle(taken)
    job.facts.update(
        samples=write_jsonl(job.folder / "samples.jsonl", taken),
        max_length=mix.max_length,
        domains=dict(sorted(Counter(s["domain"] for s in taken).items())),
        overlap=overlap.counts,
    )
    logger.info(
        "%d samples; domains %s; overlap with tests %s", len(taken), job.facts["domains"], overlap.counts or "not asked"
    )


def _draw(job: Job, name: str, count: int, rng: random.Random, reason: Callable[[Sample], str | None]) -> list[Sample]:
    index = LineIndex(job.input(f"data/dataset/{name}").file("samples.jsonl"))
    rejected, visited = Rejected(), 0
    out: list[Sample] = []
    for number, sample in index.rows(rng.sample(range(len(index)), len(index))):
        if len(out) == count:
            break
        visited += 1
        why = reason(sample)
        if why is None:
            out.append({**sample, "dataset": name})
        else:
            rejected.add(why, number)
    job.facts.setdefault("datasets", {})[name] = {
        "asked": count,
        "visited": visited,
        "taken": len(out),
        "rejected": rejected.facts(),
    }
    if len(out) < count:
        raise UserError(
            f"dataset {name}: {count} samples asked, {len(out)} of {len(index)} can be used; lost to {dict(rejected.counts)}"
        )
    return out


def _filters(job: Job, spec: Spec, overlap: Overlap) -> Callable[[Sample], str | None]:
    """A function that names why a sample is rejected, or None."""
    fits = [_fits(job, model, spec) for model in spec.mix.tokenizers]
    english = spec.mix.english
    remove = spec.mix.decontaminate == "remove"

    def reason(sample: Sample) -> str | None:
        text = text_of(sample)
        if english and sum(map(str.isascii, text)) < english * len(text):
            return "not english"
        for fit in fits:
            if (why := fit(sample)) is not None:
                return why
        if overlap.check(text) and remove:
            return "overlaps a test"
        return None

    return reason


def _fits(job: Job, model: str, spec: Spec) -> Callable[[Sample], str | None]:
    from llmfusion.data.chat import encode
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.input(f"models/{model}"), spec.chat_template)

    def fit(sample: Sample) -> str | None:
        found = encode(sample, tokenizer, spec.mix.max_length)
        return f"{found} ({model})" if isinstance(found, str) else None

    return fit
