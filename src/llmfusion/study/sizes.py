"""How large a base model is: from its files, the study, the hub's metadata or its name; never a silent guess.

Everything is read from headers; weights are not touched, and nothing is asked over the network. What the hub says of
a repository comes from :mod:`llmfusion.data.hub`, for the commands that may ask it.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.errors import DamagedError
from llmfusion.io.files import json_object_or_empty
from llmfusion.io.gguf import read_gguf_header
from llmfusion.io.safetensors import read_checkpoint_headers
from llmfusion.study.schema.base_models import GgufModel, HubModel, PathModel, ScratchModel

NUMBER = r"(\d+(?:\.\d+)?)"
START = r"(?<![a-z0-9.])"  # a number stands alone: not part of a word, a version or another number
EXPERTS = re.compile(rf"{START}(\d+)x{NUMBER}b(?![a-z0-9])")
BILLIONS = re.compile(rf"{START}{NUMBER}b(?![a-z0-9])")
MILLIONS = re.compile(rf"{START}{NUMBER}m(?![a-z0-9])")
ACTIVE = re.compile(rf"{START}a{NUMBER}b(?![a-z0-9])")
EXPERTS_OF_A_TOKEN = 2  # of a model called 8x7B, as in Mixtral
SAMPLE_BYTES = 2**20


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model; None where nothing tells."""

    parameters: float | None = None
    idle: float | None = None  # parameters of experts that a token does not pass through
    hidden_size: float | None = None
    layers: float | None = None
    vocabulary_size: float | None = None
    bytes: float | None = None  # of the weights as they will be staged

    def or_else(self, other: "ModelSize") -> "ModelSize":
        """With what ``other`` knows where this one knows nothing."""
        return replace(self, **{name: value for name, value in vars(other).items() if getattr(self, name) is None})


def size_of_base(
    entry: HubModel | PathModel | GgufModel | ScratchModel, staged: Path, facts: Mapping[str, Any], hub: ModelSize
) -> ModelSize:
    """Size of a base model: as staged in the folder ``staged`` with these facts in its manifest; else of its own files;
    else what the study says, what the ``hub`` says, or what its name says."""
    size = size_of_facts(facts).or_else(size_of_config(json_object_or_empty(staged / "config.json")))
    if isinstance(entry, ScratchModel):
        return size.or_else(_of_architecture(entry))
    name = size_of_name(entry.repo if isinstance(entry, HubModel) else entry.path)
    return size.or_else(size_of_source(entry)).or_else(_as_declared(entry)).or_else(hub).or_else(name)


def _as_declared(entry: HubModel | PathModel | GgufModel) -> ModelSize:
    if entry.parameters is None:
        return ModelSize()
    return ModelSize(entry.parameters, entry.parameters - (entry.active_parameters or entry.parameters))


def _of_architecture(entry: ScratchModel) -> ModelSize:
    """Of a model from random weights: attention, gated MLP (GPT-NeoX: two matrices), embeddings and head."""
    shape, tokenizer = entry.architecture, entry.tokenizer
    if shape is None or tokenizer is None:
        return ModelSize()
    heads = shape.num_attention_heads
    attention = 2 * shape.hidden_size**2 * (1 + (shape.num_key_value_heads or heads) / heads)
    mlp = (2 if shape.model_type == "gpt_neox" else 3) * shape.hidden_size * shape.intermediate_size
    vocabulary = tokenizer.vocabulary_size
    embeddings = (1 if shape.tie_word_embeddings else 2) * vocabulary * shape.hidden_size
    parameters = float(shape.num_hidden_layers * (attention + mlp) + embeddings)
    return ModelSize(parameters, None, shape.hidden_size, shape.num_hidden_layers, vocabulary)


def size_of_facts(facts: Mapping[str, Any]) -> ModelSize:
    """Size of a model that is made, as its manifest says."""
    known = {name: facts.get(name) for name in ("parameters", "hidden_size", "vocabulary_size")}
    return ModelSize(**{name: value for name, value in known.items() if _is_count(value)})


def size_of_source(entry: HubModel | PathModel | GgufModel) -> ModelSize:
    """Size of the files that a base model will be staged from, where they are on this machine; else nothing."""
    if isinstance(entry, GgufModel):
        return size_of_gguf(ROOT / entry.path)
    return size_of_folder(ROOT / entry.path if isinstance(entry, PathModel) else hub_snapshot(entry))


def hub_snapshot(entry: HubModel) -> Path:
    """Where the hub's client keeps this commit of a repository, whether it is there or not."""
    import huggingface_hub.constants as hub

    name = "models--" + entry.repo.replace("/", "--")
    return Path(hub.HF_HUB_CACHE) / name / "snapshots" / entry.revision


def size_of_folder(folder: Path) -> ModelSize:
    """Size of a checkpoint folder, from ``config.json`` and the headers of its safetensors files."""
    size = size_of_config(json_object_or_empty(folder / "config.json"))
    with contextlib.suppress(OSError, DamagedError):
        if tensors := read_checkpoint_headers(folder):
            files = {tensor.file for tensor in tensors.values()}
            values = sum(prod(tensor.shape) for tensor in tensors.values())
            return replace(size, parameters=values, bytes=sum(file.stat().st_size for file in files))
    return size


def size_of_gguf(file: Path) -> ModelSize:
    """Size of a GGUF file, from its header; it is staged in float32."""
    try:
        header = read_gguf_header(file)
    except (OSError, DamagedError):
        return ModelSize()
    family = f"{header.architecture}."
    own = {key.removeprefix(family): value for key, value in header.metadata.items() if key.startswith(family)}
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "vocab_size": "vocab_size",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "feed_forward_length",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
    }
    config = {"vocab_size": header.metadata["tokenizer.ggml.tokens"]}
    config |= {name: own[key] for name, key in names.items() if key in own}
    return replace(size_of_config(config), parameters=header.values, bytes=4.0 * header.values)


def size_of_config(config: Mapping[str, Any]) -> ModelSize:
    """What a model's ``config.json`` tells: width, depth, vocabulary, and experts that a token passes by."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config

    def number(*names: str) -> float | None:
        return next((float(text[name]) for name in names if _is_count(text.get(name))), None)

    width, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer", "num_layers")
    experts = number("n_routed_experts", "num_local_experts", "num_experts")
    chosen = number("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "top_k_experts")
    inner = number("moe_intermediate_size", "intermediate_size")
    idle = None
    if width and layers and experts and chosen and inner and experts > chosen:
        sparse = max(0.0, layers - (number("first_k_dense_replace") or 0)) / (number("decoder_sparse_step") or 1)
        idle = (experts - chosen) * 3 * width * inner * sparse
    return ModelSize(None, idle, width, layers, number("vocab_size"))


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True)
class Rows:
    """About how many rows a file of samples or items has, and bytes a row."""

    count: float
    bytes_each: float


def rows_of(file: Path) -> Rows | None:
    """Rows of a ``.jsonl`` file by its first megabyte; None for another file, or none."""
    with contextlib.suppress(OSError):
        if file.suffix == ".jsonl" and (size := file.stat().st_size):
            with open(file, "rb") as handle:
                start = handle.read(SAMPLE_BYTES)
            each = len(start) / max(1, start.count(b"\n") + (len(start) == size and not start.endswith(b"\n")))
            return Rows(size / each, each)
    return None


def size_of_name(name: str) -> ModelSize:
    """Size as a repository or a path says it: ``135M``, ``0.5B``, ``8x7B``, ``30B-A3B``; the last folder that tells.

    ``8x7B`` counts eight times seven, of which two are active (attention is shared, so that it is a little less).
    """
    for part in reversed(name.lower().replace("_", "-").split("/")):
        if match := EXPERTS.search(part):
            experts, each = float(match[1]), 1e9 * float(match[2])
            return ModelSize(experts * each, max(0.0, experts - EXPERTS_OF_A_TOKEN) * each)
        if match := BILLIONS.search(part) or MILLIONS.search(part):
            parameters = float(match[1]) * (1e9 if match[0].endswith("b") else 1e6)
            active = ACTIVE.search(part)
            return ModelSize(parameters, max(0.0, parameters - 1e9 * float(active[1])) if active else None)
    return ModelSize()
