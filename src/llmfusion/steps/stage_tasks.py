"""Stage one test set as items.jsonl, and its few-shot examples as shots.jsonl."""

from collections.abc import Iterator
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.data import sources
from llmfusion.data.layouts import TASK_LAYOUTS
from llmfusion.data.samples import write_jsonl, wrong_item
from llmfusion.errors import UserError
from llmfusion.study.kinds.stage_tasks import Spec
from llmfusion.study.schema.data import GeneratedSource, Source


def build(job: Job) -> None:
    """Write ``items.jsonl`` (and ``shots.jsonl``); every item gets its number as ``item``."""
    spec = job.parse(Spec)
    for source, name in ((spec.items, "items"), (spec.shots_from, "shots")):
        if source is None:
            continue
        rejected = sources.Rejected()
        count = write_jsonl(
            job.folder / f"{name}.jsonl", ({"item": i, **item} for i, item in enumerate(_items(source, rejected)))
        )
        if not count:
            raise UserError(
                f"no usable test item: {rejected.facts()}; is layout {getattr(source, 'layout', None)!r} the right one?"
            )
        job.facts.update({name: count, f"{name}_rejected": rejected.facts(), "license": sources.license_of(source)})


def _items(source: Source, rejected: sources.Rejected) -> Iterator[dict[str, Any]]:
    if isinstance(source, GeneratedSource):
        yield from sources.generated(source)
        return
    name = sources.name_of(source)
    for number, row in enumerate(sources.rows(source)):
        item = sources.apply_layout(name, TASK_LAYOUTS[source.layout], row, number)
        if item is None or wrong_item({"item": number, **item}, number) is not None:
            rejected.add("malformed", number)
        else:
            yield item
