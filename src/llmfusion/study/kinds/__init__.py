"""Kinds of artifacts: one module each, named like its Snakemake rule and its step, that declares ``KIND``.

The declaration is the only place that knows a kind: the graph, ``check``, ``estimate``, ``cost``, ``verify`` and the
test of the SLURM profile read it. A new kind is a module here, a rule in ``rules/`` and a step in
``llmfusion/steps/`` (docs/extending.md). It is checked when it is loaded;
:class:`llmfusion.study.plugins.PluginError` says what it lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmfusion.errors import UserError
from llmfusion.study.addresses import address_of, output_of
from llmfusion.study.plugins import PluginError, call_mismatch, load_plugins, plugin_names
from llmfusion.study.schema.base import Section

if TYPE_CHECKING:
    from llmfusion.study.errors import Problem
    from llmfusion.study.references import Declared
    from llmfusion.study.schema.study import Study
    from llmfusion.study.workload import Assumptions

PACKAGE = "llmfusion.study.kinds"
STEPS = "llmfusion.steps"
WILDCARDS = {"model": r"(?:base|trained|merged)/[^/]+"}  # all others are one name


class StepSpec(Section):
    """What every spec holds; a step parses it into the model that wrote it, so that a default is written once."""

    step: str = Field(description="what is made")
    recipe: int = Field(description="raised when the step's meaning changes: what was made before is then made again")
    chat_template: str | None = Field(None, description="the study's chat template where it is not the neutral one")


@dataclass(frozen=True)
class Declaration:
    """One artifact of a study."""

    body: dict[str, Any]  # of its spec, beside step and recipe
    inputs: list[str] = field(default_factory=list)  # addresses
    files: list[str] = field(default_factory=list)  # outside the study, relative to the clone
    shards: list[str] = field(default_factory=list)  # addresses of jobs that do its work beforehand


@dataclass(frozen=True)
class Cost:
    """What one job takes."""

    rates: str  # name of its coefficients in Kind.rates
    work: tuple[float, ...]  # amounts of work, one a coefficient after the first (the start)
    disk: float  # bytes of the result
    resume: float = 0.0  # bytes of one resume state
    gpu_memory: float = 0.0  # bytes in each GPU


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
    # seconds a unit of work by name of Cost.rates; the first coefficient is the start of the program
    rates: dict[str, Callable[[Assumptions], tuple[float, ...]]]
    wanted: Callable[[Study], Iterable[str]] = _no_names  # addresses that a study makes even if nothing needs them
    problems: Callable[[Declared], Iterator[Problem]] = _no_problems  # mistakes between sections
    gpus: Callable[[Any, int], int] = _no_gpus  # (spec, number of shards that did the work) -> GPUs of the job
    # (key, model of an entry, description) of a section {NAME: entry} that the kind adds to the study
    section: tuple[str, Any, str] | None = None
    is_source: bool = False  # comes from outside: `verify` lists its licence
    # counts under `fusion_gpu_hours` in cost.csv: what a method takes beyond data, base models and tests
    is_fusion: bool = False
    is_local: bool = False  # made by Snakemake's own process, never submitted to the cluster

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches this kind's addresses, with a group a wildcard."""
        return _pattern(self.address)


@cache
def _pattern(address: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", address)  # text and names of wildcards in turn
    groups = (
        f"(?P<{part}>{WILDCARDS.get(part, '[^/]+')})" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )
    return re.compile("".join(groups))


@cache
def all_kinds() -> dict[str, Kind]:
    """Every kind by the name of its rule. Raises :class:`PluginError` where a declaration is incomplete."""
    kinds: dict[str, Kind] = {}
    for name, module in load_plugins(PACKAGE, "KIND").items():
        if wrong := _mistakes(name, module.KIND, kinds):
            raise PluginError(f"{module.__file__}: KIND: {'; '.join(wrong)}")
        kinds[name] = module.KIND
    return kinds


def _mistakes(name: str, kind: object, others: dict[str, Kind]) -> list[str]:
    """What is wrong with a declaration, alone and beside the kinds that are loaded before it."""
    if not isinstance(kind, Kind):
        return [f"expected a Kind, got {type(kind).__name__}"]
    out = []
    if name not in plugin_names(STEPS):
        out.append(f"there is no step llmfusion/steps/{name}.py: the file is named like its step and its rule")
    if not (isinstance(kind.spec, type) and issubclass(kind.spec, StepSpec)):
        out.append("spec: expected a subclass of StepSpec")
    out += _address_mistakes(kind, others)
    out += _rate_mistakes(kind, others)
    wildcards = dict.fromkeys(kind.pattern.groupindex, "")
    for role, function, arguments in (("declare", kind.declare, ("graph",)), ("cost", kind.cost, COST_ARGUMENTS)):
        if error := call_mismatch(function, *arguments, **wildcards):
            out.append(f"{role}: is called with ({', '.join([*arguments, *wildcards])}): {error}")
    if kind.section is not None:
        taken = [other for other, declared in others.items() if (declared.section or ("",))[0] == kind.section[0]]
        out += [f"section {kind.section[0]!r} is declared by {other} already" for other in taken]
    return out


COST_ARGUMENTS = ("workload", "spec", "shards")


def _address_mistakes(kind: Kind, others: dict[str, Kind]) -> list[str]:
    example = kind.address.format(**{name: "base/x" if name == "model" else "x" for name in kind.pattern.groupindex})
    output = output_of(example)
    try:
        own = address_of(output)
    except UserError:
        return [f"address {kind.address!r}: give at least two parts, e.g. {kind.address}/{{name}}"]
    if own != example:
        return [f"address {kind.address!r}: its file {output} has the address {own!r}"]
    same = [other for other, declared in others.items() if declared.pattern.fullmatch(example)]
    return [f"address {kind.address!r} is also an address of {other}" for other in same]


def _rate_mistakes(kind: Kind, others: dict[str, Kind]) -> list[str]:
    if not kind.rates:
        return ["rates: none are declared"]
    # names are shared by all kinds: they are what finished jobs are measured by
    return [
        f"rates {name!r}: {other} declares other rates of this name"
        for name, rate in kind.rates.items()
        for other, declared in others.items()
        if declared.rates.get(name, rate) is not rate
    ]


@cache
def kind_of(address: str) -> Kind:
    """The kind of an address. Raises ``KeyError`` for one of no kind."""
    return _match(address)[0]


@cache
def _match(address: str) -> tuple[Kind, re.Match[str]]:
    for kind in all_kinds().values():
        if match := kind.pattern.fullmatch(address):
            return kind, match
    raise KeyError(address)


def is_source(address: str) -> bool:
    """Whether an artifact comes from outside; False also for an address of no kind that is known here."""
    try:
        return kind_of(address).is_source
    except KeyError:
        return False


def wildcards_of(address: str) -> dict[str, str]:
    """Values of the wildcards in an address."""
    return _match(address)[1].groupdict()


def parse_spec(address: str, text: str) -> Any:
    """The spec of an artifact as the model that wrote it."""
    return kind_of(address).spec.model_validate_json(text)


def gpus_of(address: str, text: str, shards: int = 0) -> int:
    """GPUs that the job with this spec asks for; ``shards``: how many other jobs have done its work."""
    return kind_of(address).gpus(parse_spec(address, text), shards)
