"""How much work each job of a study is, in units that do not depend on the machine: FLOPs, tokens, items, bytes.

A job's seconds are a product of its work and of coefficients: those that assumptions give (:class:`Assumptions`), or those
that finished jobs show (:mod:`llmfusion.costs.measured`). The first entry of the work is always 1: the start of a program.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from llmfusion import ROOT
from llmfusion.artifacts import SHARDS
from llmfusion.capture import row_bytes
from llmfusion.config.models import Study
from llmfusion.config.plan import Plan, gpus_of, output_of

TEST_ITEMS = {"mmlu": 14042, "gsm8k": 1319, "math": 5000, "humaneval": 164}  # by layout, of the tests the papers use
TRAINING = 6  # FLOPs a parameter and token: 2 forward, 4 backward (Kaplan et al. 2020)


def assumption(default: float, told: str) -> Any:
    """A field of :class:`Assumptions` with its meaning."""
    return field(default=default, metadata={"told": told})


@dataclass(frozen=True)
class Assumptions:
    """What has to be assumed as long as nothing is staged or measured. Every one can be given: ``--assume mfu=0.3``."""

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
    def given(cls, words: list[str]) -> "Assumptions":
        """From ``NAME=VALUE`` words. Raises :class:`ValueError` in the user's words."""
        from llmfusion.config.errors import nearest

        known = {one.name for one in fields(cls)}
        found: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known:
                raise ValueError(f"--assume {word}: there is no assumption {name!r}; {nearest(name, known, 30)}")
            try:
                found[name] = float(value)
            except ValueError:
                raise ValueError(f"--assume {word}: expected {name}=NUMBER") from None
            if not 0 <= found[name] < float("inf"):
                raise ValueError(f"--assume {word}: expected a number that is not negative")
        return cls(**found)


@dataclass(frozen=True)
class Work:
    """One job: ``work`` by coefficient (seconds = sum of products), devices, bytes on disk, bytes of GPU memory a device."""

    address: str
    step: str
    needs: tuple[str, ...]
    work: tuple[float, ...]
    gpus: int
    disk: float
    resume: float
    memory: float


STAGES = {  # step: stage of the report
    "dataset": "data", "tasks": "data", "mix": "data", "base": "base models", "pretrain": "base models", "capture": "teacher caches",
    "gather": "teacher caches",
    "generate": "generated answers", "train": "trainings", "merge": "merges", "answer": "answers", "score": "scores", "table": "scores",
}  # fmt: skip


class Workload:
    """All jobs of a study."""

    def __init__(self, study: Study, plan: Plan, assumed: Assumptions):
        self.study, self.assumed = study, assumed
        self.directory = ROOT / study.directory
        self.outputs = {output_of(address): address for address in plan.artifacts}
        self.jobs = {address: self._job(address, entry) for address, entry in plan.artifacts.items()}

    def made(self, address: str) -> bool:
        """Whether this artifact lies there already; a shard also where the cache does that it became a part of."""
        if address.startswith(SHARDS) and self.made(f"teachers/{address.removeprefix(SHARDS).rsplit('/', 1)[0]}"):
            return True
        return (self.directory / output_of(address)).exists()

    # ----------------------------------------------------------------------------------------------------- what is known
    def facts(self, address: str) -> dict[str, Any]:
        """What an artifact that is there says of itself."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((self.directory / output_of(address)).read_bytes())["facts"]
        return {}

    def parameters(self, model: str) -> float:
        """Staged: counted; else from the architecture, the repository's name, or the model it starts from; else assumed."""
        kind, name = model.split("/")
        if found := self.facts(f"models/{model}").get("parameters"):
            return found
        if kind != "base":
            entry = getattr(self.study.models, kind)[name]
            return self.parameters(entry.init if kind == "trained" else entry.pivot)
        base: Any = self.study.models.base[name]
        if base.kind == "scratch":
            return self.parameters(base.init) if base.init else _of_architecture(base.architecture, base.tokenizer.vocabulary_size)
        sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", getattr(base, "repo", getattr(base, "path", "")).lower())
        return float(sizes[-1]) * 1e9 if sizes else self.assumed.parameters

    def width(self, model: str) -> float:
        """Hidden size: staged, of the architecture, or that of a model of 128 values a layer and head (8B: 4,400)."""
        if found := self.facts(f"models/{model}").get("hidden_size"):
            return found
        entry: Any = self.study.models.base.get(self.root(model).split("/")[1])
        if getattr(entry, "architecture", None):
            return entry.architecture.hidden_size
        return (128 * self.parameters(model) / 12) ** (1 / 3)

    def root(self, model: str) -> str:
        """The base model at the beginning of a chain of trainings and merges."""
        kind, name = model.split("/")
        entry: Any = getattr(self.study.models, kind)[name]
        before = getattr(entry, "init", None) or getattr(entry, "pivot", None)
        return self.root(before) if before else model

    def vocabulary(self, model: str) -> str:
        """A word that is the same for models with one vocabulary."""
        root = self.root(model)
        return getattr(self.study.models.base[root.split("/")[1]], "vocabulary", root)

    def rows_of_head(self, model: str) -> float:
        """Tokens in a model's vocabulary."""
        entry: Any = self.study.models.base[self.root(model).split("/")[1]]
        own = entry.tokenizer.vocabulary_size if getattr(entry, "tokenizer", None) else self.assumed.vocabulary
        return self.facts(f"models/{model}").get("vocabulary_size") or own

    def samples(self, mix: str) -> float:
        """Samples of a mix."""
        return self.facts(f"data/mix/{mix}").get("samples") or sum(self.study.mixes[mix].datasets.values())

    def tokens(self, mix: str) -> float:
        """Tokens of a sample of this mix."""
        return min(self.assumed.tokens_per_sample, self.study.mixes[mix].max_length)

    def items(self, task: str) -> float:
        """Items of a test."""
        source: Any = self.study.tasks[task].items
        return self.facts(f"data/tasks/{task}").get("items") or getattr(source, "rows", None) or TEST_ITEMS.get(getattr(source, "layout", ""), 1000)

    # --------------------------------------------------------------------------------------------------- one job of each kind
    def _job(self, address: str, entry: dict[str, Any]) -> Work:
        spec = json.loads(entry["spec"])
        step = "pretrain" if spec.get("base", {}).get("kind") == "scratch" else "gather" if entry["shards"] else spec["step"]
        work, disk, resume, memory = getattr(self, f"_{step}")(address, spec)
        needs = tuple(self.outputs[path] for path in entry["inputs"] if path in self.outputs)
        return Work(address, step, needs, (1.0, *work), gpus_of(spec, entry["shards"]), disk, resume, memory)

    def _dataset(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        name = address.split("/")[-1]
        rows = getattr(self.study.datasets[name], "rows", None) or max((mix.datasets.get(name, 0) for mix in self.study.mixes.values()), default=0)
        size = rows * self.assumed.tokens_per_sample * 5
        return (size,), size, 0, 0

    def _tasks(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        size = self.items(address.split("/")[-1]) * 1000
        return (size,), size, 0, 0

    def _mix(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        name = address.split("/")[-1]
        samples = self.samples(name)
        return (samples * (1 + len(self.study.mixes[name].tokenizers)),), samples * self.tokens(name) * 5, 0, 0

    def _base(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        size = 2 * self.parameters(address.removeprefix("models/"))
        return (size,), size, 0, 0

    def _pretrain(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        return self._training(address.removeprefix("models/"), spec["base"])

    def _train(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        return self._training(address.removeprefix("models/"), spec["run"])

    def _training(self, model: str, run: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        """FLOPs of one process, and the same for each cached teacher of the student's vocabulary and of another."""
        parameters, mix, size = self.parameters(model), run["mix"], run.get("batch_size", 16)
        processes = run.get("processes", 1)
        samples = self.samples(mix) * (1 + len(run.get("generated", [])))
        steps = run.get("steps") or run["epochs"] * (samples // size)
        tokens = steps * size * self.tokens(mix) / processes
        online = run.get("teachers", []) if self.study.capture.kind == "online" else []
        flops = TRAINING * parameters * tokens
        forward = 2 * tokens * sum(self.parameters(teacher) for teacher in online)  # teachers that are run again
        mine = self.vocabulary(model)
        alike = sum(self.vocabulary(teacher) == mine for teacher in run.get("teachers", []))
        other = len(run.get("teachers", [])) - alike
        disk = parameters * (4 if run.get("save_dtype") == "float32" else 2)
        longest = self.study.mixes[mix].max_length
        together = (
            max(run.get("micro_batch_tokens", 0), longest) if "micro_batch_tokens" in run else (run.get("micro_batch_size") or size // processes) * longest
        )
        activations = self._activations(model, together, run.get("activation_checkpointing", False))
        caches = sum(self.rows_of_head(t) * self.width(t) * 4 for t in run.get("teachers", []))
        caches += sum(self.parameters(teacher) for teacher in online) * (4 if self.study.capture.dtype == "float32" else 2)
        return (flops + forward, flops * alike, flops * other), disk, 36 * parameters, self._state(model, run) + activations + caches

    def _state(self, model: str, run: dict[str, Any]) -> float:
        """Bytes of weights, gradients and two moments in one device; of a sharded model its part, and head, embeddings and a layer whole with gradients."""
        size = 2 if run.get("parameters") == "bfloat16" else 4
        state = (2 * size + 8) * self.parameters(model)  # moments are float32
        if run.get("sharding") != "full":
            return state
        gathered = 2 * self.rows_of_head(model) * self.width(model) + 12 * self.width(model) ** 2
        return state / run["processes"] + 2 * size * gathered

    def _activations(self, model: str, tokens: float, recomputed: bool) -> float:
        """Bytes that a forward pass keeps (34 a token, layer and value of the width: Korthikanti et al. 2022), and five times the logits."""
        width = self.width(model)
        layers = max(1.0, self.parameters(model) / (12 * width * width))
        kept = 2 * width * layers + 34 * width if recomputed else 34 * width * layers  # one layer at a time
        return tokens * (kept + 5 * 4 * self.rows_of_head(model) * self.assumed.response_share)

    def _capture(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        model, mix, width = spec["model"], spec["mix"], 4 if spec["capture"].get("dtype") == "float32" else 2
        tokens = self.samples(mix) * self.tokens(mix) / spec.get("shard", (1, 1))[1]
        disk = self._cache(model, mix, spec) / spec.get("shard", (1, 1))[1]
        batch = self.study.capture.batch_size * self.study.mixes[mix].max_length
        memory = width * self.parameters(model) + 4 * self.rows_of_head(model) * self.width(model) + batch * self.width(model) * 20
        return (2 * self.parameters(model) * tokens,), disk, 0, memory

    def _gather(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        """Every byte is read when the shards are verified and when the cache is hashed; its files are the shards'."""
        return (2 * self._cache(spec["model"], spec["mix"], spec),), 0, 0, 0

    def _cache(self, model: str, mix: str, spec: dict[str, Any]) -> float:
        """Bytes of a teacher cache: rows, head and embeddings."""
        rows = self.samples(mix) * self.tokens(mix) * self.assumed.response_share
        head = self.rows_of_head(model) * self.width(model) * (4 if spec["capture"].get("dtype") == "float32" else 2)
        return rows * row_bytes(spec["capture"], self.width(model)) + 2 * head

    def _generate(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        model, mix = spec["model"], spec["mix"]
        written = self.samples(mix) * self.tokens(mix) * self.assumed.response_share
        memory = self._answering(model, self.study.generation.dtype, self.study.generation.batch_size * self.study.mixes[mix].max_length)
        return (self.parameters(model) * written,), self.samples(mix) * self.tokens(mix) * 5, 0, memory

    def _answer(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        """Parameters times tokens: generated ones, and those read, of which a pass takes many at once (see :func:`assumed_seconds`)."""
        model, written, read, longest, items = spec["model"], 0.0, 0.0, 0.0, 0.0
        for name in spec["tasks"]:
            task = self.study.tasks[name]
            prompt = self.assumed.prompt_tokens + task.shots * self.assumed.shot_tokens
            new = 1.0 if task.format == "letter" else self.assumed.answer_share * task.max_new_tokens
            items += self.items(name)
            written, read = written + self.items(name) * new, read + self.items(name) * prompt
            longest = max(longest, prompt + task.max_new_tokens)
        parameters = self.parameters(model)
        memory = self._answering(model, self.study.answering.dtype, self.study.answering.batch_size * longest)
        return (parameters * written, 2 * parameters * read), items * 4000, 0, memory

    def _answering(self, model: str, dtype: str, tokens: float) -> float:
        """Weights, and keys and values of every token (a quarter of the heads, as in Llama 3)."""
        width, bytes_each = self.width(model), 4 if dtype == "float32" else 2
        layers = max(1.0, self.parameters(model) / (12 * width * width))
        return bytes_each * (self.parameters(model) + tokens * layers * width / 2)

    def _merge(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        parameters = self.parameters(address.removeprefix("models/"))
        return (parameters * len(spec["merge"]["parents"]),), 4 * parameters, 0, 0

    def _score(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        items = self.items(spec["task"])
        code = items if spec["format"] == "code" else 0.0
        return (items, code), items * 200, 0, 0

    def _table(self, address: str, spec: dict[str, Any]) -> tuple[tuple[float, ...], float, float, float]:
        return (float(sum(len(tasks) for tasks in spec["cells"].values())),), 1e5, 0, 0


def _of_architecture(shape: Any, vocabulary: int) -> float:
    """Parameters of a model from its shape: attention, gated MLP (three matrices; GPT-NeoX has two), embeddings and head."""
    heads = shape.num_attention_heads
    attention = 2 * shape.hidden_size**2 * (1 + (shape.num_key_value_heads or heads) / heads)
    mlp = (2 if shape.model_type == "gpt_neox" else 3) * shape.hidden_size * shape.intermediate_size
    return shape.num_hidden_layers * (attention + mlp) + (1 if shape.tie_word_embeddings else 2) * vocabulary * shape.hidden_size


def assumed_seconds(assumed: Assumptions) -> dict[str, tuple[float, ...]]:
    """Coefficients of each step's work when nothing has been measured."""
    speed = assumed.peak * assumed.mfu
    training = (assumed.start, 1 / speed, assumed.teacher_share / speed, assumed.projected_share / speed)
    return {
        "dataset": (assumed.light_start, 1 / assumed.download),
        "tasks": (assumed.light_start, 1 / assumed.download),
        "mix": (assumed.light_start, 1 / assumed.tokenizing),
        "base": (assumed.start, 1 / assumed.download),
        "pretrain": training,
        "train": training,
        "capture": (assumed.start, 1 / speed),
        "gather": (assumed.light_start, 1 / assumed.hashing),
        "generate": (assumed.start, 1 / assumed.decoding),
        "answer": (assumed.start, 1 / assumed.decoding, 1 / speed),
        "merge": (assumed.light_start, assumed.merging),
        "score": (assumed.light_start, 0.1 / assumed.grading, 1 / assumed.grading),
        "table": (assumed.light_start, 1e-4),
    }
