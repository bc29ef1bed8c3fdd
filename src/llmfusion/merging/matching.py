"""What is merged with what, from headers and settings alone.

All differences between checkpoints are reported at once, before any work.

The merge has the pivot's tensors under the pivot's names. What transformers does not read from a file is no difference:
a head that is stored although it is tied to the embeddings, or left out for the same reason; buffers (rotary
frequencies, attention masks); names with or without the base model's prefix.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io.files import JSON_LIMIT, SETTINGS_LIMIT, model_file, read_json_object, read_regular
from llmfusion.io.safetensors import FLOATS, TensorInfo, read_checkpoint_headers, tensor_bytes

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
BY_TOKEN = (*EMBEDDINGS, *HEADS, "lm_head.bias")  # a row, or a value, for each token
PREFIXES = ("model.", "transformer.", "gpt_neox.", "language_model.")
BUFFER = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|num_batches_tracked)$")
# of four dimensions: GPT-2's and GPT-NeoX's causal masks, no weights
MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
STRUCTURE = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "n_head",
)
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "n_embd", "n_layer", "n_inner")
BEHAVIOUR = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "sliding_window")


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its tensors by name and its ``config.json`` (empty if there is none)."""

    folder: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]

    @property
    def text_config(self) -> dict[str, Any]:
        """The settings of the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config


@dataclass(frozen=True)
class TensorMatch:
    """One tensor of the merge: the pivot's, and those of the models; without models the pivot's is copied.

    ``merged_values`` of it are merged; the rest, rows of tokens that only the pivot has, is copied.
    """

    name: str
    pivot: TensorInfo
    models: tuple[TensorInfo, ...] = ()
    merged_values: int = 0

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The pivot's tensor and those of the models."""
        return (self.pivot, *self.models)

    @property
    def merged_shape(self) -> tuple[int, ...]:
        """The shape of what is merged: the pivot's, or its first rows."""
        if self.merged_values == math.prod(self.pivot.shape):
            return self.pivot.shape
        row = self.pivot.shape[1:]
        return (self.merged_values // max(math.prod(row), 1), *row)


@dataclass
class Matching:
    """All tensors of the merge in the order of the pivot's files.

    ``remarks`` are what the user should know although it does not stop the merge.
    """

    pivot: Checkpoint
    models: list[Checkpoint]
    tensors: list[TensorMatch]
    remarks: list[str] = field(default_factory=list)


@dataclass
class _Comparison:
    """A pivot against the models: the differences and remarks so far."""

    pivot: Checkpoint
    models: list[Checkpoint]
    differences: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def match(pivot: Path, models: Sequence[Path]) -> Matching:
    """What is merged with what.

    Raises :class:`UserError` with every difference, and :class:`DamagedError` for damaged headers.
    """
    comparison = _Comparison(_open(pivot), [_open(folder) for folder in models])
    base = comparison.pivot
    for model in comparison.models:
        _compare_settings(comparison, model)
        _compare_vocabularies(comparison, model)
    # of another architecture or size every tensor differs: to list them would say nothing
    comparison.models = [model for model in comparison.models if not _is_foreign(base, model)]
    names = [_names_in(model, base) for model in comparison.models]
    tensors = [_match_tensor(comparison, names, name) for name in base.tensors]
    for model, own_names in zip(comparison.models, names, strict=True):
        comparison.differences += _extra_tensors(base, model, set(own_names.values()))
    if differences := comparison.differences:
        lines = "\n  ".join(differences)
        raise UserError(f"these checkpoints cannot be merged; {len(differences)} differences:\n  {lines}")
    return Matching(base, comparison.models, tensors, list(dict.fromkeys(comparison.remarks)))


def _open(folder: Path) -> Checkpoint:
    tensors = read_checkpoint_headers(folder)
    config = _read_settings(folder)
    require(bool(tensors), f"{folder}: has no .safetensors weights; pickled weights are never read")
    require(
        config.get("quantization_config") is None,
        f"{folder}: its weights are quantised (config.json: quantization_config); merge the weights it was made from",
    )
    return Checkpoint(folder, tensors, config)


def _read_settings(folder: Path) -> dict[str, Any]:
    """``config.json``, empty if it is not there."""
    if not os.path.lexists(folder / "config.json"):
        return {}
    return read_json_object(model_file(folder, "config.json"), SETTINGS_LIMIT)


# -------------------------------------------------------------------------------------- settings and tokenizers
def _compare_settings(comparison: _Comparison, model: Checkpoint) -> None:
    base = comparison.pivot
    if not base.config or not model.config:
        return  # bare weights: names and shapes are all there is
    if _architectures_differ(base, model):
        comparison.differences.append(
            f"{model.folder} is of another architecture ({_architecture(model)}) than the pivot {base.folder} "
            f"({_architecture(base)}): merge models that were trained from the pivot"
        )
        return
    if sizes := _size_differences(base, model):
        comparison.differences.append(
            f"{model.folder} is of another size than the pivot {base.folder}: {', '.join(sizes)}: "
            "merge models that were trained from the pivot"
        )
    structure = [(key, base.text_config.get(key), model.text_config.get(key)) for key in STRUCTURE]
    behaviour = [(key, base.text_config.get(key), model.text_config.get(key)) for key in BEHAVIOUR]
    comparison.differences += [
        f"{key} is {_shown(theirs)} in {model.folder} and {_shown(ours)} in the pivot {base.folder}"
        for key, ours, theirs in structure
        if _both_given_and_different(ours, theirs)
    ]
    comparison.remarks += [
        f"{key} is {_shown(theirs)} in {model.folder} and {_shown(ours)} in the pivot {base.folder}; "
        "the merge has the pivot's"
        for key, ours, theirs in behaviour
        if _both_given_and_different(ours, theirs)
    ]


def _is_foreign(base: Checkpoint, model: Checkpoint) -> bool:
    """Whether a model is of another architecture or size than the pivot, as their settings say."""
    return _architectures_differ(base, model) or bool(_size_differences(base, model))


def _architectures_differ(base: Checkpoint, model: Checkpoint) -> bool:
    return _both_given_and_different(
        base.config.get("architectures"), model.config.get("architectures")
    ) or _both_given_and_different(base.text_config.get("model_type"), model.text_config.get("model_type"))


def _architecture(checkpoint: Checkpoint) -> str:
    """The name of the model's class, else its family."""
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else checkpoint.text_config.get("model_type")
    return str(name)[:80]


def _size_differences(base: Checkpoint, model: Checkpoint) -> list[str]:
    """What is another number in the model's settings than in the pivot's: ``hidden_size 64 against 32``."""
    pairs = [(key, base.text_config.get(key), model.text_config.get(key)) for key in SIZES]
    return [
        f"{key} {_shown(theirs)} against {_shown(ours)}"
        for key, ours, theirs in pairs
        if _both_given_and_different(ours, theirs)
    ]


def _shown(value: Any) -> str:
    """A value for a message, not longer than a line can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _both_given_and_different(ours: Any, theirs: Any) -> bool:
    """What one of them leaves out is a default: files of several years write down different ones."""
    return ours is not None and theirs is not None and bool(ours != theirs)


def _compare_vocabularies(comparison: _Comparison, model: Checkpoint) -> None:
    """The same id must be the same token. Added tokens may differ, and so may the rows behind the common ones."""
    base = comparison.pivot
    if not _have_tokenizers(base, model):
        return
    ours, theirs = (model_file(one.folder, "tokenizer.json") for one in (base, model))
    if _same_bytes(ours, theirs):
        return
    our_tokens = _base_tokens(ours)
    their_tokens = _base_tokens(theirs)
    ids = sorted(i for i in our_tokens.keys() & their_tokens.keys() if our_tokens[i] != their_tokens[i])
    if ids:
        first = ids[0]
        comparison.differences.append(
            f"the tokenizers differ in {len(ids)} tokens, the first with id {first}: "
            f"{_shown(their_tokens[first])} in {model.folder} and {_shown(our_tokens[first])} in the pivot "
            f"{base.folder} ({len(their_tokens):,} tokens there, {len(our_tokens):,} in the pivot): a merge needs one "
            "vocabulary"
        )


def _same_bytes(one: Path, other: Path) -> bool:
    same_size = one.stat().st_size == other.stat().st_size
    if not same_size:
        return False
    first, second = (read_regular(path, follow_links=True, limit=JSON_LIMIT) for path in (one, other))
    return first == second


def _base_tokens(file: Path) -> dict[int, str]:
    """Tokens of the base vocabulary by id. Raises :class:`DamagedError` for a file that has none."""
    body = read_json_object(file).get("model")
    vocabulary = body.get("vocab") if isinstance(body, dict) else None
    if isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values()):
        return {i: token for token, i in vocabulary.items()}
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and entry for entry in vocabulary):
        return {i: str(entry[0]) for i, entry in enumerate(vocabulary)}  # Unigram: a list of tokens and scores
    raise DamagedError(f"{file}: has no model with a vocabulary; take a complete tokenizer.json, or move it away")


# ------------------------------------------------------------------------------------------------ names of tensors
def _names_in(model: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """The model's name of each tensor of the pivot that it has."""
    names = {name: own for name in base.tensors if (own := _name_in(name, model.tensors)) is not None}
    for name in base.tensors:
        if name not in names and name.endswith(HEADS) and _is_tied(base) and _is_tied(model):
            names.update((name, table) for table in model.tensors if table.endswith(EMBEDDINGS))
    return names


def _name_in(name: str, tensors: dict[str, TensorInfo]) -> str | None:
    """The name that ``name`` has among ``tensors``, with or without a prefix; None where it is missing."""
    renamed = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    forms = [name, renamed, re.sub(r"\.weight$", ".gamma", name), re.sub(r"\.bias$", ".beta", name)]
    forms += [prefix + name for prefix in PREFIXES]
    forms += [name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)]
    return next((form for form in forms if form in tensors), None)


def _extra_tensors(base: Checkpoint, model: Checkpoint, used: set[str]) -> list[str]:
    """Tensors of a model that the pivot has not, and that transformers would read."""
    differences = []
    for name, info in model.tensors.items():
        if name in used or _is_buffer(name, info) or not _is_float(info) or _name_in(name, base.tensors):
            continue
        if name.endswith(HEADS) and not any(own.endswith(HEADS) for own in base.tensors) and _is_tied(model):
            continue
        differences.append(f"{name} of {model.folder} is not in the pivot {base.folder}")
    return differences


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding table.

    As the settings say, else if no head is stored or it holds the same bytes.
    """
    tied = checkpoint.text_config.get("tie_word_embeddings")
    if isinstance(tied, bool) or not checkpoint.config:
        return tied is True
    heads = [info for name, info in checkpoint.tensors.items() if name.endswith(HEADS)]
    tables = [info for name, info in checkpoint.tensors.items() if name.endswith(EMBEDDINGS)]
    return bool(tables) and all(
        np.array_equal(tensor_bytes(head), tensor_bytes(table)) for head in heads for table in tables
    )


# ------------------------------------------------------------------------------------------------ one tensor
def _match_tensor(comparison: _Comparison, names: list[dict[str, str]], name: str) -> TensorMatch:
    """One tensor of the pivot with those of all models; differences and remarks are added to the comparison's.

    ``names``: for each model, its names of the pivot's tensors.
    """
    info = comparison.pivot.tensors[name]
    if _is_buffer(name, info):
        return TensorMatch(name, info)
    before = len(comparison.differences)
    rows = info.shape[:1]
    theirs: list[tuple[Checkpoint, TensorInfo]] = []
    for model, own_names in zip(comparison.models, names, strict=True):
        other = model.tensors.get(own_names.get(name, name))
        if other is not None:
            theirs.append((model, other))
            rows = _common_rows(comparison, name, rows, model, other)
        elif _is_float(info):
            comparison.differences.append(f"{name} is missing in {model.folder}")
    comparison.differences += _dtype_differences(name, info, [(comparison.pivot, info), *theirs])
    if len(comparison.differences) > before or info.dtype not in FLOATS:
        return TensorMatch(name, info)  # integers and flags are the pivot's
    return TensorMatch(name, info, tuple(other for _, other in theirs), math.prod((*rows, *info.shape[1:])))


def _common_rows(
    comparison: _Comparison, name: str, rows: tuple[int, ...], model: Checkpoint, other: TensorInfo
) -> tuple[int, ...]:
    """How many first rows are merged: ``rows``, or fewer where the model's tensor has those of fewer tokens."""
    base = comparison.pivot
    info = base.tensors[name]
    if other.shape == info.shape:
        return rows
    shapes = f"is {list(other.shape)} in {model.folder} and {list(info.shape)} in the pivot {base.folder}"
    if name.endswith(BY_TOKEN) and other.shape[1:] == info.shape[1:] and _have_tokenizers(base, model):
        comparison.remarks.append(f"{name} {shapes}: only the rows of both are merged, further ones are the pivot's")
        return min(rows, other.shape[:1])
    comparison.differences.append(f"{name} {shapes}")
    return rows


def _dtype_differences(name: str, info: TensorInfo, tensors: list[tuple[Checkpoint, TensorInfo]]) -> list[str]:
    """Tensors of a dtype that cannot be merged, or that are numbers of another kind than the pivot's."""
    return [
        f"{name} of {checkpoint.folder} is {other.dtype}, the pivot's {info.dtype}; "
        f"floating-point tensors must be {', '.join(FLOATS)}"
        for checkpoint, other in tensors
        if _is_unsupported_float(other) or _is_float(other) != _is_float(info)
    ]


def _have_tokenizers(*checkpoints: Checkpoint) -> bool:
    """Whether all say which token a row belongs to (_compare_vocabularies has compared them)."""
    return all(os.path.lexists(checkpoint.folder / "tokenizer.json") for checkpoint in checkpoints)


def _is_buffer(name: str, info: TensorInfo) -> bool:
    return bool(BUFFER.search(name)) or (len(info.shape) == 4 and bool(MASK.search(name)))


def _is_float(info: TensorInfo) -> bool:
    """Whether a tensor is floating-point or complex, of a kind that is merged or not (F64, F8_E4M3, C64)."""
    return info.dtype[0] in "FC" or info.dtype == "BF16"


def _is_unsupported_float(info: TensorInfo) -> bool:
    return _is_float(info) and info.dtype not in FLOATS
