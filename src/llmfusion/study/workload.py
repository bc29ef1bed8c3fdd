"""How much work each job of a study is, in units that do not depend on the machine: FLOPs, tokens, items, bytes.

A job's seconds are a product of its work and of coefficients: those that assumptions give (:class:`Assumptions`), or
those that finished jobs show (:mod:`llmfusion.reporting.measured`). The first entry of the work is always 1: the
start of a program. What the work of each kind of artifact is, its declaration says
(:data:`llmfusion.study.kinds.Kind.cost`).
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.errors import DamagedError
from llmfusion.io.safetensors import weight_files
from llmfusion.study.addresses import is_shard, output_of, whole_of
from llmfusion.study.errors import nearest
from llmfusion.study.graph import ArtifactGraph, PlannedArtifact
from llmfusion.study.kinds import Cost, Kind, all_kinds, kind_of, parse_spec, wildcards_of
from llmfusion.study.plugins import PluginError
from llmfusion.study.schema.base import started_from
from llmfusion.study.schema.base_models import GgufModel, HubModel, PathModel
from llmfusion.study.schema.data import PathSource, most_samples
from llmfusion.study.schema.study import Study
from llmfusion.study.sizes import ModelSize, Rows, hub_snapshot, rows_of, size_of_base

TEST_ITEMS = {"mmlu": 14042, "gsm8k": 1319, "math": 5000, "humaneval": 164}  # by layout, of the tests the papers use
BYTES_PER_TOKEN = 4.0  # of a row of JSON


def assumption(default: float, meaning: str) -> Any:
    """A field of :class:`Assumptions` with its meaning."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """What has to be assumed as long as nothing is staged or measured. ``--assume mfu=0.3`` sets one."""

    parameters: float = assumption(8e9, "parameters of a model that nothing tells the size of")
    vocabulary: float = assumption(128_256, "tokens in a vocabulary that is not known yet")
    tokens_per_sample: float = assumption(500, "tokens of a sample, prompt and response")
    response_share: float = assumption(0.6, "share of a sample's tokens that are labels")
    answer_share: float = assumption(0.3, "share of max_new_tokens that an answer has")
    prompt_tokens: float = assumption(300, "tokens of a test prompt without examples")
    shot_tokens: float = assumption(120, "tokens of one few-shot example")
    peak: float = assumption(
        989e12, "FLOP/s of one device: a GPU at full speed (H100, bfloat16, dense), or a core (measured)"
    )
    gpu_memory: float = assumption(80e9, "bytes of memory: of one GPU, or of this machine")
    mfu: float = assumption(0.4, "share of it that a training or a teacher's pass reaches")
    teacher_share: float = assumption(0.09, "time that a cached teacher adds to a training")
    projected_share: float = assumption(0.2, "time that a cached teacher of another vocabulary adds")
    decoding: float = assumption(1.2e13, "parameters times tokens generated a second, all prompts of a batch together")
    merging: float = assumption(60e-9, "seconds a parameter and parent of a merge")
    hashing: float = assumption(8e8, "bytes a second of files that are verified")
    download: float = assumption(1e8, "bytes a second from the hub, written and hashed")
    tokenizing: float = assumption(5e3, "samples a second through one tokenizer")
    grading: float = assumption(20, "items graded a second, programs included")
    start: float = assumption(10, "seconds until a program that loads a model begins its work")
    light_start: float = assumption(2, "seconds until another program does")
    scheduling: float = assumption(15, "seconds a job waits and Snakemake starts, GPU held")

    uses_gpus: bool = True  # jobs that run a model have GPUs
    given: frozenset[str] = frozenset()  # names of those that are the user's own

    @classmethod
    def named(cls) -> dict[str, str]:
        """The meaning of every assumption by its name."""
        return {one.name: one.metadata["meaning"] for one in fields(cls) if one.metadata}

    def parse(self, words: list[str]) -> "Assumptions":
        """These, with those that ``NAME=VALUE`` words give. Raises :class:`ValueError` in the user's words."""
        known = self.named()
        values: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known:
                raise ValueError(f"--assume {word}: there is no assumption {name!r}; {nearest(name, known, 30)}")
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"--assume {word}: expected {name}=NUMBER") from None
            if not 0 <= values[name] < float("inf"):
                raise ValueError(f"--assume {word}: expected a number that is not negative")
        return replace(self, **values, given=frozenset(values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class JobWork:
    """The work of one job, and what it needs of the machine."""

    address: str
    rates: str  # name of its coefficients (Kind.rates)
    report_stage: str
    needs: tuple[str, ...]  # addresses of its inputs
    work: tuple[float, ...]  # amounts, one a coefficient: seconds = sum of products
    gpus: int
    disk: float  # bytes of the result
    resume: float  # bytes of one resume state
    gpu_memory: float  # bytes in each GPU
    guessed: tuple[str, ...] = ()  # base models of unknown size that the amounts rest on


class Workload:
    """All jobs of a study. ``hub``: what the hub says of base models' sizes, by name, where it was asked."""

    def __init__(
        self, study: Study, graph: ArtifactGraph, assumed: Assumptions, hub: Mapping[str, ModelSize] | None = None
    ):
        self.study = study
        self.assumed = assumed
        self.directory = ROOT / study.directory
        self.hub = hub or {}
        self._sizes: dict[tuple[str, bool], ModelSize] = {}  # of base models, before and after they are staged
        self._guessed: set[str] = set()  # base models that the cost being computed had to guess the size of
        self.outputs = {output_of(address): address for address in graph.artifacts}
        self.jobs = {address: self.job(address, artifact) for address, artifact in graph.artifacts.items()}

    def is_made(self, address: str) -> bool:
        """Whether this artifact is there already; a shard also where the cache is that it became a part of."""
        return (self.directory / output_of(address)).exists() or (is_shard(address) and self.is_made(whole_of(address)))

    def job(self, address: str, artifact: PlannedArtifact) -> JobWork:
        """The work of one artifact's job, by what is staged now."""
        kind = kind_of(address)
        spec = parse_spec(address, artifact.spec)
        self._guessed = set()
        cost = kind.cost(self, spec, len(artifact.shards), **wildcards_of(address))
        self._check_rates(address, kind, cost)
        return JobWork(
            address=address,
            rates=cost.rates,
            report_stage=kind.report_stage,
            needs=tuple(self.outputs[path] for path in artifact.inputs if path in self.outputs),
            work=(1.0, *cost.work),
            gpus=kind.gpus(spec, len(artifact.shards)),
            disk=cost.disk,
            resume=cost.resume,
            gpu_memory=cost.gpu_memory,
            guessed=tuple(sorted(self._guessed)),
        )

    def _check_rates(self, address: str, kind: Kind, cost: Cost) -> None:
        """Raise :class:`PluginError` where a cost has no rates, or another number of amounts than coefficients."""
        if cost.rates not in kind.rates:
            raise PluginError(f"{address}: its kind has no rates {cost.rates!r}; {nearest(cost.rates, kind.rates)}")
        coefficients = kind.rates[cost.rates](self.assumed)
        if len(coefficients) != 1 + len(cost.work):
            amounts = f"the start and {len(cost.work)} amounts of work"
            raise PluginError(f"{address}: {amounts} for {len(coefficients)} coefficients of {cost.rates!r}")

    def facts(self, address: str) -> dict[str, Any]:
        """Metadata of an artifact that is there, else nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            facts: dict[str, Any] = json.loads((self.directory / output_of(address)).read_bytes())["facts"]
            return facts
        return {}

    def size(self, model: str) -> ModelSize:
        """What is known of a model's size: its own if it is made, else that of the base model it begins with."""
        base = self.base_of(model)
        key = (base, self.is_made(f"models/{base}"))
        if key not in self._sizes:
            name = base.split("/")[1]
            folder = (self.directory / output_of(f"models/{base}")).parent
            told = self.hub.get(name, ModelSize())
            own = size_of_base(self.study.models.base[name], folder, self.facts(f"models/{base}"), told)
            start = started_from(self.study.models.base[name])
            self._sizes[key] = own.or_else(self.size(start)) if start else own
        made = self.facts(f"models/{model}")
        return replace(self._sizes[key], **{"parameters": made["parameters"]} if made.get("parameters") else {})

    def parameters(self, model: str) -> float:
        """All parameters of a model, all experts included; assumed where nothing tells."""
        if (known := self.size(model).parameters) is not None:
            return float(known)
        if "parameters" not in self.assumed.given:
            self._guessed.add(self.base_of(model))
        return self.assumed.parameters

    def active_parameters(self, model: str) -> float:
        """Parameters that one token passes through: fewer than all in a mixture of experts."""
        parameters = self.parameters(model)
        return max(parameters - (self.size(model).idle or 0.0), 0.01 * parameters)

    def hidden_size(self, model: str) -> float:
        """Hidden size: known, or that of a model of 128 values a layer and head (8B: 4,400)."""
        return float(self.size(model).hidden_size or (128 * self.active_parameters(model) / 12) ** (1 / 3))

    def layers(self, model: str) -> float:
        """Layers: known, or those of a model of this width."""
        known = self.size(model).layers
        return float(known or max(1.0, self.active_parameters(model) / (12 * self.hidden_size(model) ** 2)))

    def weight_bytes(self, model: str) -> float:
        """Bytes of a base model's weights as they are staged: known, or 16 bits a parameter (GGUF files: 32)."""
        each = 4 if isinstance(self.study.model_entry(model), GgufModel) else 2
        return float(self.size(model).bytes or each * self.parameters(model))

    def bytes_to_stage(self, model: str) -> float:
        """Bytes that staging a base model takes on the study's disk.

        Nothing where its files lie on it already, in their folder or in the cache of the hub's client: they get a
        second name. What is downloaded is counted once, whichever disk the cache is on.
        """
        entry = self.study.model_entry(model)
        size = self.weight_bytes(model)
        if isinstance(entry, GgufModel):
            return size
        assert isinstance(entry, HubModel | PathModel)
        folder = ROOT / entry.path if isinstance(entry, PathModel) else hub_snapshot(entry)
        with contextlib.suppress(OSError, DamagedError):  # staging will say what is wrong with the folder
            files = weight_files(folder)
            return 0.0 if files and all(map(self._on_disk_of_study, files)) else size
        return size

    def _on_disk_of_study(self, file: Path) -> bool:
        place = next(folder for folder in (self.directory, *self.directory.parents) if folder.exists())
        with contextlib.suppress(OSError):
            return file.stat().st_dev == place.stat().st_dev
        return False

    def base_of(self, model: str) -> str:
        """The base model at the beginning of a chain of trainings and merges."""
        before = started_from(self.study.model_entry(model))
        return self.base_of(before) if before else model

    def vocabulary(self, model: str) -> str:
        """A word that is the same for models with one vocabulary."""
        return self.study.vocabulary(model)

    def vocabulary_size(self, model: str) -> float:
        """Tokens in a model's vocabulary."""
        return float(self.size(model).vocabulary_size or self.assumed.vocabulary)

    def samples(self, mix: str) -> float:
        """Samples of a mix."""
        return float(self.facts(f"data/mix/{mix}").get("samples") or sum(self.draws(mix).values()))

    def draws(self, mix: str) -> dict[str, float]:
        """How many samples a mix draws from each dataset, at most."""
        return {name: float(most_samples(count)) for name, count in self.study.mixes[mix].datasets.items()}

    def tokens(self, mix: str) -> float:
        """Tokens of a sample of this mix, the mean over its datasets."""
        entry = self.study.mixes[mix]
        draws = self.draws(mix)
        total = sum(count * min(self.tokens_of_dataset(name), entry.max_length) for name, count in draws.items())
        return total / sum(draws.values())

    def tokens_of_dataset(self, dataset: str) -> float:
        """Tokens of a sample: by the bytes of its rows where its file is here, else assumed."""
        rows = self.rows(self.study.datasets[dataset])
        return rows.bytes_each / BYTES_PER_TOKEN if rows else self.assumed.tokens_per_sample

    def rows(self, source: Any) -> Rows | None:
        """Rows of a dataset's or a task's own file, if it has one that is here."""
        return rows_of(ROOT / source.path) if isinstance(source, PathSource) else None

    def items(self, task: str) -> float:
        """Items of a test."""
        source: Any = self.study.tasks[task].items
        known = self.facts(f"data/tasks/{task}").get("items") or getattr(source, "rows", None)
        if known is None and (rows := self.rows(source)):
            known = rows.count
        return float(known or TEST_ITEMS.get(getattr(source, "layout", ""), 1000))

    def items_asked(self, task: str) -> float:
        """Items of a test that models are asked: all, or as many as its limit allows."""
        return min(self.items(task), self.study.tasks[task].limit or float("inf"))

    def prompt_tokens(self, task: str) -> float:
        """Tokens of a prompt with its examples."""
        entry = self.study.tasks[task]
        rows = self.rows(entry.items)
        own = rows.bytes_each / BYTES_PER_TOKEN if rows else self.assumed.prompt_tokens
        return own + entry.shots * (own if rows else self.assumed.shot_tokens)

    def inference_bytes(self, model: str, dtype: str, tokens: float) -> float:
        """Weights, and keys and values of so many tokens (a quarter of the heads, as in Llama 3)."""
        bytes_each = 4 if dtype == "float32" else 2
        return bytes_each * (self.parameters(model) + tokens * self.layers(model) * self.hidden_size(model) / 2)

    def behind(self, targets: Iterable[str], until_made: bool = False) -> list[str]:
        """The targets and all that they are made from, in the order of the study; ``until_made``: only what is still
        to be made for them, as Snakemake sees it: not what is missing behind something that is there."""
        found: set[str] = set()
        todo = list(targets)
        while todo:
            address = todo.pop()
            if address not in found and not (until_made and self.is_made(address)):
                found.add(address)
                todo += self.jobs[address].needs
        return [address for address in self.jobs if address in found]


def assumed_seconds(assumed: Assumptions) -> dict[str, tuple[float, ...]]:
    """Coefficients of each kind of work when nothing has been measured."""
    return {name: rate(assumed) for kind in all_kinds().values() for name, rate in kind.rates.items()}


def seconds_of(work: Sequence[float], coefficients: Sequence[float]) -> float:
    """A job's seconds: the sum of its amounts of work times their coefficients."""
    return float(sum(amount * rate for amount, rate in zip(work, coefficients, strict=True)))
