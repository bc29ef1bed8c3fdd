"""Kinds of artifacts: one module each, named like its Snakemake rule and its step, that declares ``KIND``.

The declaration is the only place that knows a kind: the graph, ``check``, ``estimate``, ``cost``, ``verify`` and the test of the SLURM
profile read it. A new kind is a module here, a rule in ``rules/`` and a step in ``llmfusion/steps/`` (docs/extending.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmfusion.study.plugins import load_plugins
from llmfusion.study.schema.base import Section

if TYPE_CHECKING:
    from llmfusion.study.errors import Problem
    from llmfusion.study.references import Declared
    from llmfusion.study.schema.study import Study
    from llmfusion.study.workload import Assumptions

PACKAGE = "llmfusion.study.kinds"
WILDCARDS = {"model": r"(?:base|trained|merged)/[^/]+"}  # all others are one name


class StepSpec(Section):
    """What every spec holds; a step parses its spec back into the model that wrote it, so that a default is written once."""

    step: str = Field(description="what is made")
    recipe: int = Field(description="raised when the step's meaning changes: what was made before is then made again")
    chat_template: str | None = Field(None, description="the study's chat template where it is not the neutral one")


@dataclass(frozen=True)
class Declaration:
    """One artifact: the body of its spec, the addresses of its inputs, files outside the study, and jobs that do its work beforehand."""

    body: dict[str, Any]
    inputs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """What one job takes: amounts of work by coefficient of ``rates`` (:data:`Kind.rates`), bytes on disk, of resume state, and in one GPU."""

    rates: str
    work: tuple[float, ...]
    disk: float
    resume: float = 0.0
    gpu_memory: float = 0.0


def _no_names(study: Study) -> Iterable[str]:
    return ()


def _no_problems(declared: Declared) -> Iterator[Problem]:
    return iter(())


def _no_gpus(spec: Any, shards: int) -> int:
    return 0


@dataclass(frozen=True)
class Kind:
    """Everything that is known of one kind of artifact."""

    step: str  # in specs; two kinds may share it where one does a part of the other's work
    recipe: int
    address: str  # with {wildcards}: the file is results/ADDRESS/manifest.json, see llmfusion.study.addresses
    stage: str | None  # the Snakemake target that asks for all of them; None: only what needs them does
    report_stage: str  # the line of `llmfusion estimate`
    spec: type[StepSpec]
    declare: Callable[..., Declaration]  # (graph, **wildcards)
    cost: Callable[..., Cost]  # (workload, spec, shards, **wildcards)
    rates: dict[
        str, Callable[[Assumptions], tuple[float, ...]]
    ]  # seconds a unit of work, by name of Cost.rates; the first is the start
    wanted: Callable[[Study], Iterable[str]] = _no_names  # addresses that a study makes even if nothing needs them
    problems: Callable[[Declared], Iterator[Problem]] = _no_problems  # mistakes between sections
    gpus: Callable[[Any, int], int] = _no_gpus  # (spec, number of shards that did the work) -> GPUs of the job
    section: tuple[str, Any, str] | None = (
        None  # (key, model of an entry, description) of a section of the study that the kind adds
    )
    is_source: bool = False  # comes from outside: `verify` lists its licence
    is_fusion: bool = (
        False  # counts under `fusion_gpu_hours` in cost.csv: what a method takes beyond data, base models and tests
    )
    is_local: bool = False  # made by Snakemake's own process, never submitted to the cluster

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches this kind's addresses, with a group a wildcard."""
        return _pattern(self.address)


@cache
def _pattern(address: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", address)
    return re.compile(
        "".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{WILDCARDS.get(p, '[^/]+')})" for i, p in enumerate(parts))
    )


@cache
def all_kinds() -> dict[str, Kind]:
    """Every kind by the name of its rule."""
    return {name: module.KIND for name, module in load_plugins(PACKAGE, "KIND").items()}


@cache
def kind_of(address: str) -> Kind:
    """The kind of an address. Raises ``KeyError`` for one of no kind."""
    return _match(address)[0]


@cache
def _match(address: str) -> tuple[Kind, re.Match[str]]:
    for kind in all_kinds().values():
        if found := kind.pattern.fullmatch(address):
            return kind, found
    raise KeyError(address)


def wildcards_of(address: str) -> dict[str, str]:
    """Values of the wildcards in an address."""
    return _match(address)[1].groupdict()


def parse_spec(address: str, text: str) -> Any:
    """The spec of an artifact as the model that wrote it."""
    return kind_of(address).spec.model_validate_json(text)


def gpus_of(address: str, text: str, shards: int = 0) -> int:
    """GPUs that the job with this spec asks for; ``shards``: how many other jobs have done its work."""
    return kind_of(address).gpus(parse_spec(address, text), shards)


def step_of(text: str) -> str:
    """The step that a spec names."""
    return json.loads(text)["step"]
