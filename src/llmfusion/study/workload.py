"""How much work each job of a study is, in units that do not depend on the machine: FLOPs, tokens, items, bytes.

A job's seconds are a product of its work and of coefficients: those that assumptions give (:class:`Assumptions`), or
those that finished jobs show (:mod:`llmfusion.reporting.measured`). The first entry of the work is always 1: the
start of a program. What the work of each kind of artifact is, its declaration says
(:data:`llmfusion.study.kinds.Kind.cost`).
"""

import contextlib
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from llmfusion import ROOT
from llmfusion.study.addresses import is_shard, output_of, whole_of
from llmfusion.study.errors import nearest
from llmfusion.study.graph import ArtifactGraph, PlannedArtifact
from llmfusion.study.kinds import Cost, Kind, all_kinds, kind_of, parse_spec, wildcards_of
from llmfusion.study.plugins import PluginError
from llmfusion.study.references import started_from
from llmfusion.study.schema.data import most_samples
from llmfusion.study.schema.study import Study

TEST_ITEMS = {"mmlu": 14042, "gsm8k": 1319, "math": 5000, "humaneval": 164}  # by layout, of the tests the papers use


def assumption(default: float, meaning: str) -> Any:
    """A field of :class:`Assumptions` with its meaning."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """What has to be assumed as long as nothing is staged or measured. ``--assume mfu=0.3`` sets one."""

    parameters: float = assumption(8e9, "parameters of a model that is not staged and whose name does not tell")
    vocabulary: float = assumption(128_256, "tokens in its vocabulary")
    tokens_per_sample: float = assumption(500, "tokens of a sample, prompt and response")
    response_share: float = assumption(0.6, "share of a sample's tokens that are labels")
    answer_share: float = assumption(0.3, "share of max_new_tokens that an answer has")
    prompt_tokens: float = assumption(300, "tokens of a test prompt without examples")
    shot_tokens: float = assumption(120, "tokens of one few-shot example")
    peak: float = assumption(989e12, "FLOP/s of one GPU at full speed (H100, bfloat16, dense)")
    gpu_memory: float = assumption(80e9, "bytes of one GPU's memory")
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
    scheduling: float = assumption(15, "seconds a job waits and starts Snakemake on the cluster, GPU held")

    @classmethod
    def parse(cls, words: list[str]) -> "Assumptions":
        """From ``NAME=VALUE`` words. Raises :class:`ValueError` in the user's words."""
        known = {one.name for one in fields(cls)}
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
        return cls(**values)


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
    resume: float  # bytes of resume state
    gpu_memory: float  # bytes in each GPU


class Workload:
    """All jobs of a study."""

    def __init__(self, study: Study, graph: ArtifactGraph, assumed: Assumptions):
        self.study = study
        self.assumed = assumed
        self.directory = ROOT / study.directory
        self.outputs = {output_of(address): address for address in graph.artifacts}
        self.jobs = {address: self._job(address, artifact) for address, artifact in graph.artifacts.items()}

    def is_made(self, address: str) -> bool:
        """Whether this artifact is there already; a shard also where the cache is that it became a part of."""
        return (self.directory / output_of(address)).exists() or (is_shard(address) and self.is_made(whole_of(address)))

    def _job(self, address: str, artifact: PlannedArtifact) -> JobWork:
        kind = kind_of(address)
        spec = parse_spec(address, artifact.spec)
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

    def parameters(self, model: str) -> float:
        """Counted if staged; else by the architecture, the repository's name or the model before it; else assumed."""
        if counted := self.facts(f"models/{model}").get("parameters"):
            return float(counted)
        base: Any = self.study.model_entry(model)
        if before := started_from(base):
            return self.parameters(before)
        if base.kind == "scratch":
            return _of_architecture(base.architecture, base.tokenizer.vocabulary_size)
        name = getattr(base, "repo", getattr(base, "path", "")).lower()
        sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", name)
        return float(sizes[-1]) * 1e9 if sizes else self.assumed.parameters

    def hidden_size(self, model: str) -> float:
        """Hidden size: staged, of the architecture, or that of a model of 128 values a layer and head (8B: 4,400)."""
        if staged := self.facts(f"models/{model}").get("hidden_size"):
            return float(staged)
        entry: Any = self.study.models.base.get(self.base_of(model).split("/")[1])
        if getattr(entry, "architecture", None):
            return float(entry.architecture.hidden_size)
        return float((128 * self.parameters(model) / 12) ** (1 / 3))

    def base_of(self, model: str) -> str:
        """The base model at the beginning of a chain of trainings and merges."""
        before = started_from(self.study.model_entry(model))
        return self.base_of(before) if before else model

    def vocabulary(self, model: str) -> str:
        """A word that is the same for models with one vocabulary."""
        root = self.base_of(model)
        return str(getattr(self.study.models.base[root.split("/")[1]], "vocabulary", root))

    def vocabulary_size(self, model: str) -> float:
        """Tokens in a model's vocabulary."""
        entry: Any = self.study.models.base[self.base_of(model).split("/")[1]]
        own = entry.tokenizer.vocabulary_size if getattr(entry, "tokenizer", None) else self.assumed.vocabulary
        return float(self.facts(f"models/{model}").get("vocabulary_size") or own)

    def samples(self, mix: str) -> float:
        """Samples of a mix."""
        counts = self.study.mixes[mix].datasets.values()
        return float(self.facts(f"data/mix/{mix}").get("samples") or sum(map(most_samples, counts)))

    def tokens(self, mix: str) -> float:
        """Tokens of a sample of this mix."""
        return min(self.assumed.tokens_per_sample, self.study.mixes[mix].max_length)

    def items(self, task: str) -> float:
        """Items of a test."""
        source: Any = self.study.tasks[task].items
        known = self.facts(f"data/tasks/{task}").get("items") or getattr(source, "rows", None)
        return float(known or TEST_ITEMS.get(getattr(source, "layout", ""), 1000))

    def items_asked(self, task: str) -> float:
        """Items of a test that models are asked: all, or as many as its limit allows."""
        return min(self.items(task), self.study.tasks[task].limit or float("inf"))

    def inference_bytes(self, model: str, dtype: str, tokens: float) -> float:
        """Weights, and keys and values of so many tokens (a quarter of the heads, as in Llama 3)."""
        width = self.hidden_size(model)
        bytes_each = 4 if dtype == "float32" else 2
        layers = max(1.0, self.parameters(model) / (12 * width * width))
        return bytes_each * (self.parameters(model) + tokens * layers * width / 2)


def _of_architecture(shape: Any, vocabulary: int) -> float:
    """Parameters of a model from its shape: attention, gated MLP (GPT-NeoX: two matrices), embeddings and head."""
    heads = shape.num_attention_heads
    attention = 2 * shape.hidden_size**2 * (1 + (shape.num_key_value_heads or heads) / heads)
    mlp = (2 if shape.model_type == "gpt_neox" else 3) * shape.hidden_size * shape.intermediate_size
    embeddings = (1 if shape.tie_word_embeddings else 2) * vocabulary * shape.hidden_size
    return float(shape.num_hidden_layers * (attention + mlp) + embeddings)


def assumed_seconds(assumed: Assumptions) -> dict[str, tuple[float, ...]]:
    """Coefficients of each kind of work when nothing has been measured."""
    return {name: rate(assumed) for kind in all_kinds().values() for name, rate in kind.rates.items()}
