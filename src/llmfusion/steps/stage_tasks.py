"""Stage one test set as items.jsonl, and its few-shot examples as shots.jsonl."""

from collections.abc import Iterator

from llmfusion import ROOT
from llmfusion.artifacts.job import Job
from llmfusion.data import hub, sources
from llmfusion.data.layout import item_layouts
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import check_item
from llmfusion.errors import UserError
from llmfusion.io.jsonl import Row, write_jsonl
from llmfusion.study.kinds.stage_tasks import Spec
from llmfusion.study.schema.data import GeneratedSource, HubSource, PathSource, Source


def build(job: Job) -> None:
    """Write ``items.jsonl`` (and ``shots.jsonl``); every item gets its number as ``item``."""
    spec = job.parse(Spec)
    for source, name in ((spec.items, "items"), (spec.shots_from, "shots")):
        if source is None:
            continue
        if isinstance(source, PathSource):
            job.restrict_to_readers_of(ROOT / source.path)
        if isinstance(source, HubSource):
            hub.require_room(source, job.folder)
        rejected = Rejected()
        items = ({"item": number, **item} for number, item in enumerate(_items(source, rejected)))
        count = write_jsonl(job.folder / f"{name}.jsonl", items)
        if not count:
            raise UserError(
                f"no usable test item: {rejected.facts()}; is layout {getattr(source, 'layout', None)!r} the right one?"
            )
        job.facts.update({name: count, f"{name}_rejected": rejected.facts(), "license": sources.license_of(source)})


def _items(source: Source, rejected: Rejected) -> Iterator[Row]:
    if isinstance(source, GeneratedSource):
        yield from sources.generated(source)
        return
    name = sources.name_of(source)
    layout = item_layouts()[source.layout]
    for number, row in enumerate(sources.rows(source)):
        item = sources.apply_layout(name, layout, row, number)
        if item is None or check_item({"item": number, **item}, number) is not None:
            rejected.add("malformed", number)
        else:
            yield item
