"""What a study will download, as the hub describes it, before the first byte: ``llmfusion estimate --staging``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmfusion import ROOT
from llmfusion.data import hub
from llmfusion.data.hub import Repository
from llmfusion.errors import UserError
from llmfusion.io.files import format_bytes
from llmfusion.study.schema.base_models import HubModel
from llmfusion.study.schema.data import HubSource
from llmfusion.study.schema.study import Study
from llmfusion.study.sizes import ModelSize

LINE = "{:48} {:8} {:>6} {:>10} {:>12}  {:9} {}"


@dataclass
class StagingPlan:
    """Repositories that a study takes files from, what goes to which disk, and which were not described."""

    repositories: list[Repository] = field(default_factory=list)
    sizes: dict[str, ModelSize] = field(default_factory=dict)  # of base models by name
    wanted: dict[Path, float] = field(default_factory=dict)  # bytes by place
    problems: list[str] = field(default_factory=list)

    @property
    def lacking(self) -> list[str]:
        """A sentence for each disk that cannot hold what is wanted of it."""
        return hub.lacking(self.wanted)

    def lines(self) -> list[str]:
        """A table with a line a repository, and what is downloaded in all."""
        out = [LINE.format("repository", "kind", "files", "size", "to download", "gated", "license")]
        for one in self.repositories:
            size, rest = format_bytes(one.size), format_bytes(one.to_download) if one.to_download else "in cache"
            gated = "gated" if one.is_gated else "no"
            out.append(LINE.format(one.name, one.kind, len(one.files), size, rest, gated, one.license))
        total = sum(one.to_download for one in self.repositories)
        out += ["", f"to download: {format_bytes(total)}"]
        out += [f"  {format_bytes(size)} into {place}" for place, size in self.wanted.items() if size]
        return [*out, *self.problems, ""]


def plan_staging(study: Study, addresses: Iterable[str]) -> StagingPlan:
    """Ask the hub about everything that the artifacts at ``addresses`` are staged from."""
    plan = StagingPlan()
    folder = ROOT / study.directory
    seen: set[str] = set()
    for name, source in _sources(study, addresses):
        key = source.model_dump_json()
        if key in seen:
            continue
        seen.add(key)
        try:
            repository = hub.describe(source)
        except UserError as error:
            plan.problems.append(f"error: {error}")
            continue
        plan.repositories.append(repository)
        for place, size in hub.places(repository, folder).items():
            plan.wanted[place] = plan.wanted.get(place, 0) + size
        if isinstance(source, HubModel):
            weights = repository.weight_bytes
            plan.sizes[name] = ModelSize(parameters=repository.parameters or weights / 2, bytes=weights)
    return plan


def _sources(study: Study, addresses: Iterable[str]) -> Iterator[tuple[str, HubModel | HubSource]]:
    """Every model and source of rows on the hub behind these addresses, with the name of its entry."""
    for address in addresses:
        name = address.split("/")[-1]
        if address.startswith("models/base/"):
            sources = [study.models.base[name]]
        elif address.startswith("data/dataset/"):
            sources = [study.datasets[name]]  # type: ignore[list-item]
        elif address.startswith("data/tasks/"):
            sources = [study.tasks[name].items, study.tasks[name].shots_from]  # type: ignore[list-item]
        else:
            sources = []
        yield from ((name, source) for source in sources if isinstance(source, HubModel | HubSource))
