"""What is merged with what, from headers and settings alone: every difference between checkpoints is told at once, before any work.

The merge has the pivot's tensors under the pivot's names. What transformers does not read from a file is no difference: a head that is
stored although it is tied to the embeddings, or left out for the same reason; buffers (rotary frequencies, attention masks); names
with or without the base model's prefix.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.errors import UserError, require
from llmfusion.io.files import read_json_object
from llmfusion.io.safetensors import FLOATS, TensorInfo, read_checkpoint_headers, tensor_bytes

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
BY_TOKEN = (*EMBEDDINGS, *HEADS, "lm_head.bias")  # a row, or a value, for each token
PREFIXES = ("model.", "transformer.", "gpt_neox.", "language_model.")
BUFFER = re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|num_batches_tracked)$")
MASK = re.compile(
    r"(^|\.)(attn|attention)\.bias$"
)  # of four dimensions: GPT-2's and GPT-NeoX's causal masks, no weights
STRUCTURE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "n_head",
)
BEHAVIOUR = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "sliding_window")


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its tensors by name and its ``config.json`` (empty if there is none)."""

    folder: Path
    entries: dict[str, TensorInfo]
    config: dict[str, Any]

    @property
    def text(self) -> dict[str, Any]:
        """The settings of the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config


@dataclass(frozen=True)
class TensorMatch:
    """One tensor of the merge: the pivot's, those of the models (none: the pivot's is copied), and how many of its values are merged
    (the rest, rows of tokens that only the pivot has, is copied)."""

    name: str
    pivot: TensorInfo
    models: tuple[TensorInfo, ...] = ()
    values: int = 0


@dataclass
class Matching:
    """All parts in the order of the pivot's files, and what the user should know although it does not stop the merge."""

    pivot: Checkpoint
    models: list[Checkpoint]
    parts: list[TensorMatch]
    remarks: list[str] = field(default_factory=list)


def match(pivot: Path, models: Sequence[Path]) -> Matching:
    """What is merged with what. Raises :class:`UserError` with every difference, and :class:`DamagedError` for damaged headers."""
    base, others = _open(pivot), [_open(folder) for folder in models]
    wrong: list[str] = []
    remarks: list[str] = []
    for other in others:
        _compare_settings(base, other, wrong, remarks)
        _compare_vocabularies(base, other, wrong)
    names = [_names(base, other) for other in others]
    parts = []
    for name, entry in base.entries.items():
        found = [(other, other.entries.get(own.get(name, name))) for other, own in zip(others, names, strict=True)]
        parts.append(_part(name, entry, base, found, wrong, remarks))
    for other, own in zip(others, names, strict=True):
        wrong += _extra(base, other, set(own.values()))
    if wrong:
        raise UserError(f"these checkpoints cannot be merged; {len(wrong)} differences:\n  " + "\n  ".join(wrong))
    return Matching(base, others, parts, list(dict.fromkeys(remarks)))


def _open(folder: Path) -> Checkpoint:
    entries, config = read_checkpoint_headers(folder), _json(folder / "config.json")
    require(bool(entries), f"{folder}: has no .safetensors weights; pickled weights are never read")
    require(
        "quantization_config" not in config,
        f"{folder}: its weights are quantised (config.json: quantization_config); merge the weights it was made from",
    )
    return Checkpoint(folder, entries, config)


def _json(file: Path) -> dict[str, Any]:
    """A JSON file, empty if it is not there."""
    return read_json_object(file) if file.exists() else {}


# ------------------------------------------------------------------------------------------------ settings and tokenizers
def _compare_settings(base: Checkpoint, other: Checkpoint, wrong: list[str], remarks: list[str]) -> None:
    if not base.config or not other.config:
        return  # bare weights: names and shapes are all there is
    # what one of them leaves out is a default: files of several years write down different ones
    pairs = [("architectures", base.config.get("architectures"), other.config.get("architectures"))]
    pairs += [(key, base.text.get(key), other.text.get(key)) for key in STRUCTURE]
    wrong += [
        f"{key} is {b!r} in {other.folder} and {a!r} in the pivot {base.folder}"
        for key, a, b in pairs
        if a != b and None not in (a, b)
    ]
    for key in BEHAVIOUR:
        a, b = base.text.get(key), other.text.get(key)
        if a != b and None not in (a, b):
            remarks.append(
                f"{key} is {b!r} in {other.folder} and {a!r} in the pivot {base.folder}; the merge has the pivot's"
            )


def _compare_vocabularies(base: Checkpoint, other: Checkpoint, wrong: list[str]) -> None:
    """The same id must be the same token. Added tokens may differ, and so may the rows behind the common ones."""
    ours, theirs = base.folder / "tokenizer.json", other.folder / "tokenizer.json"
    if not ours.exists() or not theirs.exists() or _same_bytes(ours, theirs):
        return
    tokens, others = _tokens(ours), _tokens(theirs)
    differ = sorted(i for i in tokens.keys() & others.keys() if tokens[i] != others[i])
    if differ:
        i = differ[0]
        told = f"{len(differ)} tokens, the first with id {i}: {others[i]!r} in {other.folder} and {tokens[i]!r} in the pivot {base.folder}"
        wrong.append(f"the tokenizers differ in {told}")


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _tokens(file: Path) -> dict[int, str]:
    """Tokens of the base vocabulary by id."""
    model = _json(file).get("model", {}).get("vocab", {})
    if isinstance(model, dict):
        return {i: token for token, i in model.items()}
    return {i: entry[0] for i, entry in enumerate(model)}  # Unigram: a list of tokens and scores


# ------------------------------------------------------------------------------------------------ tensors
def _names(base: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """The other checkpoint's name of each tensor of the pivot that it has."""
    out = {name: found for name in base.entries if (found := _name_in(name, other.entries)) is not None}
    for name in base.entries:
        if name not in out and name.endswith(HEADS) and _tied(base) and _tied(other):
            out.update((name, table) for table in other.entries if table.endswith(EMBEDDINGS))
    return out


def _name_in(name: str, entries: dict[str, TensorInfo]) -> str | None:
    renamed = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    forms = [name, renamed, re.sub(r"\.weight$", ".gamma", name), re.sub(r"\.bias$", ".beta", name)]
    forms += [prefix + name for prefix in PREFIXES] + [
        name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)
    ]
    return next((form for form in forms if form in entries), None)


def _part(
    name: str,
    entry: TensorInfo,
    base: Checkpoint,
    found: list[tuple[Checkpoint, TensorInfo | None]],
    wrong: list[str],
    remarks: list[str],
) -> TensorMatch:
    """One tensor against all models; differences and remarks are added to the lists."""
    if _is_buffer(name, entry):
        return TensorMatch(name, entry)
    models, before = [], len(wrong)
    rows = entry.shape[:1]
    for other, theirs in found:
        if theirs is None:
            wrong += [f"{name} is missing in {other.folder}"] if _is_float(entry) else []
            continue
        if theirs.shape != entry.shape:
            what = f"is {list(theirs.shape)} in {other.folder} and {list(entry.shape)} in the pivot {base.folder}"
            if name.endswith(BY_TOKEN) and theirs.shape[1:] == entry.shape[1:] and _tokenizers(base, other):
                rows = min(rows, theirs.shape[:1])
                remarks.append(f"{name} {what}: only the rows of both are merged, further ones are the pivot's")
            else:
                wrong.append(f"{name} {what}")
        models.append(theirs)
    for checkpoint, theirs in ((base, entry), *found):
        if theirs is not None and (_odd(theirs) or _is_float(theirs) != _is_float(entry)):
            told = f"{name} of {checkpoint.folder} is {theirs.dtype}, the pivot's {entry.dtype}"
            wrong.append(f"{told}; floating-point tensors must be {', '.join(FLOATS)}")
    if len(wrong) > before or entry.dtype not in FLOATS:
        return TensorMatch(name, entry)  # integers and flags are the pivot's
    return TensorMatch(name, entry, tuple(models), math.prod((*rows, *entry.shape[1:])))


def _tokenizers(base: Checkpoint, other: Checkpoint) -> bool:
    """Whether both can be asked which token a row belongs to (_compare_vocabularies has)."""
    return all((checkpoint.folder / "tokenizer.json").exists() for checkpoint in (base, other))


def _extra(base: Checkpoint, other: Checkpoint, used: set[str]) -> list[str]:
    """Tensors of a model that the pivot has not, and that transformers would read."""
    wrong = []
    for name, entry in other.entries.items():
        if name in used or _is_buffer(name, entry) or not _is_float(entry) or _name_in(name, base.entries):
            continue
        if name.endswith(HEADS) and not any(own.endswith(HEADS) for own in base.entries) and _tied(other):
            continue
        wrong.append(f"{name} of {other.folder} is not in the pivot {base.folder}")
    return wrong


def _is_buffer(name: str, entry: TensorInfo) -> bool:
    return bool(BUFFER.search(name)) or (len(entry.shape) == 4 and bool(MASK.search(name)))


def _is_float(entry: TensorInfo) -> bool:
    """Whether a tensor is floating-point or complex, of a kind that is merged or not (F64, F8_E4M3, C64)."""
    return entry.dtype[0] in "FC" or entry.dtype == "BF16"


def _odd(entry: TensorInfo) -> bool:
    return _is_float(entry) and entry.dtype not in FLOATS


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding table: as its settings say, else if no head is stored or it holds the same bytes."""
    told = checkpoint.text.get("tie_word_embeddings")
    if isinstance(told, bool) or not checkpoint.config:
        return told is True
    heads = [entry for name, entry in checkpoint.entries.items() if name.endswith(HEADS)]
    tables = [entry for name, entry in checkpoint.entries.items() if name.endswith(EMBEDDINGS)]
    return bool(tables) and all(
        np.array_equal(tensor_bytes(head), tensor_bytes(table)) for head in heads for table in tables
    )
