"""Stage one dataset as samples.jsonl, counting what is left out and why."""

import logging
import random
from collections.abc import Iterator

from llmfusion import ROOT
from llmfusion.artifacts.job import Job
from llmfusion.data import hub, sources
from llmfusion.data.layout import sample_layouts
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import Sample, check_dataset_sample, sample_id, text_of
from llmfusion.data.turns import split_between_turns
from llmfusion.errors import UserError
from llmfusion.io.jsonl import write_jsonl
from llmfusion.study.kinds.stage_dataset import Spec
from llmfusion.study.schema.data import GeneratedDataset, HubDataset, PathDataset

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``; facts: rows read, samples kept, rejected by reason (malformed, duplicate)."""
    dataset = job.parse(Spec).dataset
    if isinstance(dataset, PathDataset):
        job.restrict_to_readers_of(ROOT / dataset.path)
    if isinstance(dataset, HubDataset):
        hub.require_room(dataset, job.folder)
    rejected = Rejected()
    counts = {"rows": 0}
    samples = (
        _generated(dataset, counts) if isinstance(dataset, GeneratedDataset) else _converted(dataset, rejected, counts)
    )
    count = write_jsonl(job.folder / "samples.jsonl", samples)
    job.facts.update(samples=count, rows=counts["rows"], rejected=rejected.facts(), license=sources.license_of(dataset))
    logger.info("%d samples of %d rows; rejected: %s", count, counts["rows"], dict(rejected.counts) or "none")
    if not count:
        raise UserError(
            f"no usable sample in {counts['rows']} rows: {rejected.facts()}; "
            f"is layout {getattr(dataset, 'layout', None)!r} the right one?"
        )


def _generated(dataset: GeneratedDataset, counts: dict[str, int]) -> Iterator[Sample]:
    origin = sources.origin(dataset)
    for number, body in enumerate(sources.generated(dataset)):
        counts["rows"] += 1
        yield {"id": sample_id(origin, number, body), "domain": dataset.domain, **body}


def _converted(dataset: HubDataset | PathDataset, rejected: Rejected, counts: dict[str, int]) -> Iterator[Sample]:
    """Samples of the rows, without those that cannot be used or have been there before."""
    origin = sources.origin(dataset)
    name = sources.name_of(dataset)
    layout = sample_layouts()[dataset.layout]
    columns = dataset.columns.model_dump() if dataset.columns else {}
    rng = random.Random(42)
    seen: set[int] = set()
    for number, row in enumerate(sources.rows(dataset)):
        counts["rows"] += 1
        body = sources.apply_layout(name, lambda r: layout(r, columns, rng), row, number)
        if body is None:
            rejected.add("malformed", number)
            continue
        for part in split_between_turns(body, dataset.split_characters):
            sample = {"id": sample_id(origin, number, part), "domain": dataset.domain, **part}
            if check_dataset_sample(sample, number) is not None:
                rejected.add("malformed", number)
                continue
            key = hash(text_of(part))
            if key in seen:
                rejected.add("duplicate", number)
                continue
            seen.add(key)
            yield sample
