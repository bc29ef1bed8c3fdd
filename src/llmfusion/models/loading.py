"""Load and save models and tokenizers with the checks transformers leaves out.

transformers loads a checkpoint with a missing tensor (filled at random), an extra one, one of integers or a NaN without an
error. Here the files are verified against the manifest first (:func:`llmfusion.artifacts.store.read`), no tensor may be missing,
unexpected or of another kind, and all values must be finite. Remote code is never run and pickled weights are never read.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TEMPLATES
from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io.files import read_json_object
from llmfusion.io.safetensors import FLOATS, TensorInfo, read_headers, weight_files


def load_tokenizer(model: Artifact | Path, chat_template: str | None) -> Any:
    """The model's tokenizer; without a chat template of its own it gets the study's (a name, or Jinja text)."""
    import transformers

    folder = model.folder if isinstance(model, Artifact) else model
    if (settings := folder / "tokenizer_config.json").exists():
        read_json_object(settings)
    # tokenizer.json as it is: the class that tokenizer_config.json names may rebuild it (a byte-level one declared as
    # LlamaTokenizerFast would lose its spaces)
    kind: Any = (
        transformers.PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else transformers.AutoTokenizer
    )
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        raise _cannot(folder, "tokenizer", error) from error
    require(tokenizer.eos_token_id is not None, f"{folder}: the tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are marked by position, never by id
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATES.get(chat_template or "neutral", chat_template)
    _check_template(tokenizer, folder)
    return tokenizer


def _check_template(tokenizer: Any, folder: Path) -> None:
    """Raise :class:`UserError` for a chat template that is no Jinja; what it makes of roles is found sample by sample."""
    import jinja2

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{folder}: the chat template, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError:
        pass


def _class(name: Any, base: type) -> Any:
    """The class of transformers with this name if it is a ``base``, else None."""
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _cannot(folder: Path, what: str, error: Exception) -> UserError:
    """What to raise where transformers fails: the file that is no JSON if there is one, else transformers' own words."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as wrong:
            return DamagedError(f"{file}: expected JSON: {wrong}")
    told = " ".join(str(error).split())[:400]
    return UserError(f"{folder}: the {what} cannot be loaded: {type(error).__name__}: {told}")


def load_model(model: Artifact, dtype: str) -> Any:
    """The model of a verified artifact in ``dtype`` (float32 or bfloat16), in eval mode, on the CPU.

    Raises :class:`DamagedError` naming the file for what its weights or settings cannot be: headers, tensors missing,
    unexpected, of another shape or kind of number, values that are not finite; :class:`UserError` for what transformers
    cannot load without running code or unpickling from the checkpoint.
    """
    import torch

    kind, entries = _kind(model), _weights(model)
    try:
        loaded, info = kind.from_pretrained(
            model.folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,  # mismatches are told, and refused below with all others
        )  # fmt: skip
    except Exception as error:  # many kinds from many layers
        raise _cannot(model.folder, "model", error) from error
    state = loaded.state_dict()
    wrong = [*_wrong_names(loaded, info), *_wrong_kinds(state, entries)]
    if wrong:
        raise DamagedError(
            f"{_files(model, entries)}: tensors that are not what the model needs ({len(wrong)}): {'; '.join(wrong[:5])}"
        )
    if (bad := not_finite(state)) is not None:
        raise DamagedError(
            f"{entries[bad].file if bad in entries else model.folder}: tensor {bad} is not finite: it holds a NaN or an infinity"
        )
    return loaded.eval()


def empty_model(model: Artifact) -> Any:
    """The model of a verified artifact without its weights: for a process that gets its part of them from another."""
    kind = _kind(model)
    try:
        made = _without_weights(kind, kind.config_class.from_pretrained(model.folder, local_files_only=True))
    except Exception as error:  # as above
        raise _cannot(model.folder, "model", error) from error
    return made.eval()


def meta_copy(model: Any) -> Any:
    """Another model of the same shape, settings and mode, without weights (torch's meta device); buffers are there."""
    made = _without_weights(type(model), model.config)
    made.generation_config = model.generation_config
    return made.train(model.training)


def _without_weights(kind: Any, config: Any) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made = kind(config)
    made.tie_weights()  # what was tied has been made empty one by one
    return made


def _kind(model: Artifact) -> Any:
    """The class of transformers that ``config.json`` names; where there is one, an auto_map beside it is not followed."""
    import transformers

    config = read_json_object(model.file("config.json"))
    for file in ("generation_config.json", "model.safetensors.index.json"):
        if (model.folder / file).exists():
            read_json_object(model.file(file))  # transformers goes on without settings that it cannot read
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "?"
    kind = _class(name, transformers.PreTrainedModel)
    code = "; code from its repository (auto_map) is never run" if "auto_map" in config else ""
    require(
        kind is not None,
        f"{model.folder}: transformers {transformers.__version__} has no class {name!r}{code}; take a model transformers knows",
    )
    return kind


def _weights(model: Artifact) -> dict[str, TensorInfo]:
    """Headers of the weights that transformers would read: one file, else those of the index."""
    files = weight_files(model.folder)
    require(bool(files), f"{model.folder}: has no .safetensors weights; pickled weights are never read")
    return read_headers([model.file(path.name) for path in files])


def _files(model: Artifact, entries: dict[str, TensorInfo]) -> str:
    files = {entry.file for entry in entries.values()}
    return str(files.pop() if len(files) == 1 else model.folder)


def _wrong_names(loaded: Any, info: dict[str, Any]) -> list[str]:
    """Tensors missing (tied heads apart), unexpected or of another shape, in words."""
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or [])
    wrong = [f"{name} is missing" for name in sorted(set(info["missing_keys"]) - tied)]
    wrong += [f"{name} is not the model's" for name in sorted(info["unexpected_keys"])]
    wrong += [
        f"{name} is {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    head = loaded.get_output_embeddings()
    if (
        head is not None
        and getattr(loaded.config.get_text_config(), "tie_word_embeddings", False)
        and head.weight is not loaded.get_input_embeddings().weight
    ):
        wrong.append("a head of its own, where config.json ties it to the embeddings")
    return wrong


def _wrong_kinds(state: dict[str, Any], entries: dict[str, TensorInfo]) -> list[str]:
    """Tensors stored as another kind of number than weights are, which would be cast without a word."""
    expected = " or ".join(FLOATS)
    return [
        f"{n} is {e.dtype}, expected {expected}"
        for n, e in entries.items()
        if n in state and state[n].is_floating_point() and e.dtype not in FLOATS
    ]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, and those the model's own generation settings add."""
    more = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])})


def not_finite(state: dict[str, Any]) -> str | None:
    """Name of the first tensor with a NaN or an infinity."""
    import torch

    return next(
        (
            name
            for name, tensor in state.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ),
        None,
    )


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Save weights (``dtype``, safetensors), configs and tokenizer with its chat template. Returns facts for the manifest.

    Raises :class:`UserError` if a weight is not finite, as computed or as rounded to ``dtype``.
    """
    import torch

    model = model.to(getattr(torch, dtype))
    if (name := not_finite(model.state_dict())) is not None:
        raise UserError(f"{folder}: tensor {name} is not finite in {dtype}; nothing was published")
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return model_facts(folder, tokenizer)


def model_facts(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What later steps and checks want to know without loading the model."""
    config = read_json_object(folder / "config.json")
    text = config.get("text_config", config)
    return {
        "architecture": (config.get("architectures") or ["?"])[0],
        "hidden_size": text.get("hidden_size", text.get("n_embd")),
        "vocabulary_size": text.get("vocab_size"),
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "tokenizer_size": len(tokenizer),
        "parameters": sum(count_parameters(path) for path in weight_files(folder)),
        "eos_token": tokenizer.eos_token,
        "max_positions": text.get("max_position_embeddings"),
    }


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of what makes two vocabularies the same: base vocabulary, merges, normaliser and pre-tokenizer, not added tokens."""
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    same = {key: body.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    added = {token["content"] for token in body.get("added_tokens", [])}
    same["model"]["vocab"] = (
        {k: v for k, v in same["model"]["vocab"].items() if k not in added}
        if isinstance(same["model"].get("vocab"), dict)
        else same["model"].get("vocab")
    )
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header."""
    return sum(math.prod(entry.shape) for entry in read_headers([path]).values())


BEHIND_THE_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


def require_linear_head(config: Any, folder: Path) -> None:
    """Raise :class:`UserError` for a model that changes logits behind its head: no loss or distribution here would be the model's own."""
    for name in BEHIND_THE_HEAD:
        value = getattr(config.get_text_config(), name, None)
        require(
            value in (None, 1.0),
            f"{folder}: {name} is {value}: it changes logits behind the head; such models can be neither trained nor cached",
        )
