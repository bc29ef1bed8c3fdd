"""Stage one dataset as samples.jsonl, counting what is left out and why."""

import logging
import random
from collections.abc import Iterator

from llmfusion.artifacts.job import Job
from llmfusion.data import sources
from llmfusion.data.layouts import LAYOUTS, split
from llmfusion.data.samples import Sample, sample_id, text_of, write_jsonl, wrong_staged
from llmfusion.errors import UserError
from llmfusion.study.kinds.stage_dataset import Spec
from llmfusion.study.schema.data import GeneratedDataset, HubDataset, PathDataset

logger = logging.getLogger(__name__)


def build(job: Job) -> None:
    """Write ``samples.jsonl``; facts: rows read, samples kept, rejected by reason (malformed, duplicate)."""
    dataset = job.parse(Spec).dataset
    rejected = sources.Rejected()
    counted = {"rows": 0}
    samples = (
        _generated(dataset, counted)
        if isinstance(dataset, GeneratedDataset)
        else _converted(dataset, rejected, counted)
    )
    count = write_jsonl(job.folder / "samples.jsonl", samples)
    job.facts.update(
        samples=count, rows=counted["rows"], rejected=rejected.facts(), license=sources.license_of(dataset)
    )
    logger.info("%d samples of %d rows; rejected: %s", count, counted["rows"], dict(rejected.counts) or "none")
    if not count:
        raise UserError(
            f"no usable sample in {counted['rows']} rows: {rejected.facts()}; is layout {getattr(dataset, 'layout', None)!r} the right one?"
        )


def _generated(dataset: GeneratedDataset, counted: dict[str, int]) -> Iterator[Sample]:
    origin = sources.origin(dataset)
    for number, body in enumerate(sources.generated(dataset)):
        counted["rows"] += 1
        yield {"id": sample_id(origin, number, body), "domain": dataset.domain, **body}


def _converted(
    dataset: HubDataset | PathDataset, rejected: sources.Rejected, counted: dict[str, int]
) -> Iterator[Sample]:
    origin, rng = sources.origin(dataset), random.Random(42)
    name = sources.name_of(dataset)
    layout = LAYOUTS[dataset.layout]
    columns = dataset.columns.model_dump() if dataset.columns else {}
    seen: set[int] = set()
    for number, row in enumerate(sources.rows(dataset)):
        counted["rows"] += 1
        body = sources.apply_layout(name, lambda r: layout(r, columns, rng), row, number)
        if body is None:
            rejected.add("malformed", number)
            continue
        for part in split(body, dataset.split_characters):
            sample = {"id": sample_id(origin, number, part), "domain": dataset.domain, **part}
            if wrong_staged(sample, number) is not None:
                rejected.add("malformed", number)
                continue
            key = hash(text_of(part))
            if key in seen:
                rejected.add("duplicate", number)
                continue
            seen.add(key)
            yield sample
