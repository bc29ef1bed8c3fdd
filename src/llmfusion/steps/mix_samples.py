"""Draw samples from datasets, keeping only what every tokenizer can hold."""

import logging
import random
from collections import Counter
from collections.abc import Callable

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited
from llmfusion.data.overlap import Overlap
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import Sample, check_dataset_sample, read_items, text_of
from llmfusion.errors import UserError
from llmfusion.io.jsonl import LineIndex, write_jsonl
from llmfusion.models.vocabularies import require_declared_vocabularies
from llmfusion.study.kinds.mix_samples import Spec

RejectionReason = Callable[[Sample], str | None]  # why a sample is rejected, or None
logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``.

    Rows are visited in a random order and the first that pass are taken, which draws the same distribution as filtering
    everything first. Facts: per dataset asked, visited, taken and rejected by reason; overlap.
    """
    spec = job.parse(Spec)
    mix = spec.mix
    require_declared_vocabularies({name: one for name, one in job.inputs.items() if name.startswith("models/base/")})
    rng = random.Random(f"mix {mix.seed}")
    overlap = Overlap({task: read_items(job.input(f"data/tasks/{task}").file("items.jsonl")) for task in mix.against})
    reason = _filters(job, spec, overlap)
    by_dataset = (_draw(job, name, count, rng, reason) for name, count in sorted(mix.datasets.items()))
    taken: list[Sample] = [sample for samples in by_dataset for sample in samples]
    _refuse_repeated(taken)
    rng.shuffle(taken)
    job.facts.update(
        samples=write_jsonl(job.folder / "samples.jsonl", taken),
        max_length=mix.max_length,
        domains=dict(sorted(Counter(s["domain"] for s in taken).items())),
        overlap=overlap.counts,
        license=inherited({f"data/dataset/{name}": job.input(f"data/dataset/{name}") for name in mix.datasets}),
    )
    counts = overlap.counts or "not asked"
    logger.info("%d samples; domains %s; overlap with tests %s", len(taken), job.facts["domains"], counts)


def _refuse_repeated(samples: list[Sample]) -> None:
    repeated = {name for name, times in Counter(s["id"] for s in samples).items() if times > 1}
    if repeated:
        datasets = ", ".join(sorted({s["dataset"] for s in samples if s["id"] in repeated}))
        raise UserError(
            f"{len(repeated)} samples are drawn twice, from the datasets {datasets}, one is {min(repeated)}: "
            "give each source under one name"
        )


def _draw(job: Job, name: str, count: int, rng: random.Random, reason: RejectionReason) -> list[Sample]:
    """``count`` samples of a dataset that nothing rejects, in a random order."""
    index = LineIndex(job.input(f"data/dataset/{name}").file("samples.jsonl"), check_dataset_sample)
    rejected = Rejected()
    visited = 0
    taken: list[Sample] = []
    for number, sample in index.rows(rng.sample(range(len(index)), len(index))):
        if len(taken) == count:
            break
        visited += 1
        why = reason(sample)
        if why is None:
            taken.append({**sample, "dataset": name})
        else:
            rejected.add(why, number)
    counts = {"asked": count, "visited": visited, "taken": len(taken), "rejected": rejected.facts()}
    job.facts.setdefault("datasets", {})[name] = counts
    if len(taken) < count:
        raise UserError(
            f"dataset {name}: {count} samples asked, {len(taken)} of {len(index)} can be used; "
            f"lost to {dict(rejected.counts)}"
        )
    return taken


def _filters(job: Job, spec: Spec, overlap: Overlap) -> RejectionReason:
    """A function that names why a sample is rejected, or None."""
    does_not_fit = [_length_filter(job, model, spec) for model in spec.mix.tokenizers]
    english = spec.mix.english
    remove = spec.mix.decontaminate == "remove"

    def reason(sample: Sample) -> str | None:
        text = text_of(sample)
        if english and sum(map(str.isascii, text)) < english * len(text):
            return "not english"
        for check in does_not_fit:
            if (why := check(sample)) is not None:
                return why
        if overlap.check(text) and remove:
            return "overlaps a test"
        return None

    return reason


def _length_filter(job: Job, model: str, spec: Spec) -> RejectionReason:
    """Rejects what one model's tokenizer and chat template cannot hold in ``max_length`` tokens."""
    from llmfusion.data.chat import encode
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.input(f"models/{model}"), spec.chat_template)

    def reason(sample: Sample) -> str | None:
        encoded = encode(sample, tokenizer, spec.mix.max_length)
        return f"{encoded} ({model})" if isinstance(encoded, str) else None

    return reason
