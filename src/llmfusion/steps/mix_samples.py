"""Draw samples from datasets, keeping only what every tokenizer can hold."""

import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.licences import inherited
from llmfusion.data.overlap import Overlap
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import Sample, check_dataset_sample, read_items, text_of
from llmfusion.errors import UserError
from llmfusion.io.jsonl import LineIndex, write_jsonl
from llmfusion.models.vocabularies import require_declared_vocabularies
from llmfusion.study.kinds.mix_samples import Spec
from llmfusion.study.schema.data import Mix, UpTo, most_samples

RejectionReasons = Callable[[Sample], list[str]]  # why a sample is rejected: every reason; empty: it is not
Filter = Callable[[Sample], str | None]  # one reason, or None
logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``.

    Rows are visited in a random order and the first that pass are taken, which draws the same distribution as filtering
    everything first. Facts: per dataset asked, visited, taken and rejected by reason; overlap. Raises
    :class:`UserError` with every dataset that has too few samples, after all of them have been visited.
    """
    spec = job.parse(Spec)
    mix = spec.mix
    require_declared_vocabularies({name: one for name, one in job.inputs.items() if name.startswith("models/base/")})
    rng = random.Random(f"mix {mix.seed}")
    overlap = Overlap({task: read_items(job.input(f"data/tasks/{task}").file("items.jsonl")) for task in mix.against})
    reasons = _filters(job, spec, overlap)
    taken: list[Sample] = []
    for name, count in sorted(mix.datasets.items()):
        taken += _draw(job, name, count, rng, reasons)
    _refuse_shortfalls(mix, job.facts["datasets"])
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


def _refuse_shortfalls(mix: Mix, drawn: dict[str, dict[str, Any]]) -> None:
    """Raise :class:`UserError` where datasets have fewer samples than asked; with ``up_to``, where one has none."""
    short = [
        f"  {name}: {facts['asked']} samples asked, {facts['taken']} of {facts['visited']} can be used; "
        f"lost to {_counts(facts)}"
        for name, facts in drawn.items()
        if facts["taken"] < (1 if isinstance(mix.datasets[name], UpTo) else facts["asked"])
    ]
    if short:
        names = "a dataset has" if len(short) == 1 else f"{len(short)} datasets have"
        advice = "Ask for fewer, or for as many as there are: {up_to: NUMBER}"
        raise UserError("\n".join([f"{names} too few samples for this mix. {advice}", *short]))


def _counts(facts: dict[str, Any]) -> str:
    """Rejections of a dataset by reason, for a message."""
    return ", ".join(f"{reason} ({rejected['count']})" for reason, rejected in facts["rejected"].items()) or "nothing"


def _refuse_repeated(samples: list[Sample]) -> None:
    repeated = {name for name, times in Counter(s["id"] for s in samples).items() if times > 1}
    if repeated:
        datasets = ", ".join(sorted({s["dataset"] for s in samples if s["id"] in repeated}))
        raise UserError(
            f"{len(repeated)} samples are drawn twice, from the datasets {datasets}, one is {min(repeated)}: "
            "give each source under one name"
        )


def _draw(job: Job, name: str, count: int | UpTo, rng: random.Random, reasons: RejectionReasons) -> list[Sample]:
    """Samples of a dataset that nothing rejects, in a random order: ``count``, or fewer where there are no more."""
    index = LineIndex(job.input(f"data/dataset/{name}").file("samples.jsonl"), check_dataset_sample)
    rejected = Rejected()
    visited = 0
    taken: list[Sample] = []
    for _, sample in index.rows(rng.sample(range(len(index)), len(index))):
        if len(taken) == most_samples(count):
            break
        visited += 1
        why = reasons(sample)
        if not why:
            taken.append({**sample, "dataset": name})
        for reason in why:
            rejected.add(reason, sample["id"])
    facts = {"asked": most_samples(count), "visited": visited, "taken": len(taken), "rejected": rejected.facts()}
    job.facts.setdefault("datasets", {})[name] = facts
    if isinstance(count, UpTo):
        facts["up_to"] = True
        logger.info("%s: %d samples of up to %d; lost to %s", name, len(taken), count.up_to, _counts(facts))
    return taken


def _filters(job: Job, spec: Spec, overlap: Overlap) -> RejectionReasons:
    """A function that names every reason why a sample is rejected."""
    filters = [*_text_filters(spec.mix), *(_length_filter(job, model, spec) for model in spec.mix.tokenizers)]
    remove = spec.mix.decontaminate == "remove"

    def reasons(sample: Sample) -> list[str]:
        why = [reason for check in filters if (reason := check(sample)) is not None]
        if not why and overlap.check(text_of(sample)) and remove:  # overlap counts samples that nothing else rejects
            return ["overlaps a test"]
        return why

    return reasons


def _text_filters(mix: Mix) -> list[Filter]:
    """Filters that need no model: the share of ASCII characters, and the language."""
    filters: list[Filter] = []
    if mix.min_ascii:

        def ascii_share(sample: Sample) -> str | None:
            text = text_of(sample)
            return f"ascii below {mix.min_ascii:g}" if sum(map(str.isascii, text)) < mix.min_ascii * len(text) else None

        filters.append(ascii_share)
    if mix.languages:
        from llmfusion.data.language import language_filter

        may_be = language_filter(mix.languages)
        filters.append(lambda sample: None if may_be(text_of(sample)) else f"language not {'/'.join(mix.languages)}")
    return filters


def _length_filter(job: Job, model: str, spec: Spec) -> Filter:
    """Rejects what one model's tokenizer and chat template cannot hold in ``max_length`` tokens."""
    from llmfusion.data.chat import encode
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(job.input(f"models/{model}"), spec.chat_template)

    def reason(sample: Sample) -> str | None:
        encoded = encode(sample, tokenizer, spec.mix.max_length)
        return f"{encoded} ({model})" if isinstance(encoded, str) else None

    return reason
