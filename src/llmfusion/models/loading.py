"""Load and save models and tokenizers with the checks transformers leaves out.

transformers loads a checkpoint with a missing tensor (filled at random), an extra one, one of integers or a NaN
without an error. Here the files are verified against the manifest first (:func:`llmfusion.artifacts.store.read`), no
tensor may be missing, unexpected or of another dtype, and all values must be finite. Remote code is never run and
pickled weights are never read.
"""

import hashlib
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TEMPLATES, chat_format, closing_tokens
from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io import progress_bars
from llmfusion.io.safetensors import FLOATS, TensorInfo
from llmfusion.models.folder import (
    ModelFolder,
    check_layers,
    clean_config,
    explain_failure,
    is_method,
    loadable_files,
    private_folder,
    text_config,
    tokenizer_files,
)

PROBE = f"a {'a' * 100} 1.\n"  # also where a pattern would try all ways to cut it
MOST_BUFFERS = 2**28  # values of a model that are no weights: frequencies, masks


def load_tokenizer(model: Artifact | Path, chat_template: str | None) -> Any:
    """The model's tokenizer; without a chat template of its own it gets the study's (a name, or Jinja text)."""
    folder = model.folder if isinstance(model, Artifact) else model
    tokenizer = read_tokenizer(model)
    require(tokenizer.eos_token_id is not None, f"{folder}: the tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are marked by position, never by id
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATES.get(chat_template or "neutral", chat_template)
    chat_format(tokenizer)  # raises UserError for a template that is no Jinja or not safe; roles are checked by sample
    return tokenizer


def read_tokenizer(model: Artifact | Path) -> Any:
    """The tokenizer of a folder, whose files are checked first.

    ``tokenizer.json`` as it is: the class that ``tokenizer_config.json`` names may rebuild it (a byte-level one
    declared as ``LlamaTokenizerFast`` would lose its spaces). Raises :class:`UserError` for what cannot be read.
    """
    import transformers

    model_folder = ModelFolder.of(model)
    with explain_failure(model_folder.folder, "tokenizer"):
        files = tokenizer_files(model_folder)
        is_fast = files["tokenizer.json"] is not None
        tokenizer_class: Any = transformers.PreTrainedTokenizerFast if is_fast else transformers.AutoTokenizer
        with private_folder(files) as private:
            tokenizer = tokenizer_class.from_pretrained(private, local_files_only=True, trust_remote_code=False)
        tokenizer.name_or_path = str(model_folder.folder)
        if getattr(tokenizer, "vocab_file", None) is not None:
            tokenizer.vocab_file = str(model_folder.folder / Path(tokenizer.vocab_file).name)
        len(tokenizer)  # fails here, if it is going to
        if not tokenizer.encode(PROBE, add_special_tokens=False):
            raise DamagedError(f"{model_folder.folder}: the tokenizer makes no tokens of a text; take a complete one")
    return tokenizer


def load_model(model: Artifact, dtype: str) -> Any:
    """The model of a verified artifact in ``dtype`` (float32 or bfloat16), in eval mode, on the CPU.

    Raises :class:`DamagedError` naming the file for weights or settings that no model of the project has: damaged
    headers, tensors missing, unexpected, of another shape or dtype, values that are not finite; :class:`UserError` for
    what transformers cannot load without running code or unpickling from the checkpoint.
    """
    import torch

    progress_bars.show_only_in_terminals()
    folder = ModelFolder.of(model)
    with explain_failure(model.folder, "model"):
        model_class = model_class_of(folder)
        require_possible_size(folder, model_class)
        with private_folder(loadable_files(folder, model_class.config_class)) as private:
            loaded, info = model_class.from_pretrained(
                private,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in ``info``, and refused below with everything else
                output_loading_info=True,
            )
        loaded.config.name_or_path = loaded.name_or_path = str(model.folder)
        _require_sound(model, loaded, info, folder.weights)
    return loaded.eval()


def _require_sound(model: Artifact, loaded: Any, info: dict[str, Any], stored: dict[str, TensorInfo]) -> None:
    """Raise :class:`DamagedError` unless the weights are those that the model needs, and finite."""
    state = loaded.state_dict()
    wrong = [*_wrong_names(loaded, info), *_wrong_dtypes(state, stored)]
    if wrong:
        files = {tensor.file for tensor in stored.values()}
        place = files.pop() if len(files) == 1 else model.folder
        raise DamagedError(f"{place}: tensors that are not what the model needs ({len(wrong)}): {'; '.join(wrong[:5])}")
    if (name := not_finite(state)) is not None:
        place = stored[name].file if name in stored else model.folder
        raise DamagedError(f"{place}: tensor {name} is not finite: it holds a NaN or an infinity")


def empty_model(model: Artifact) -> Any:
    """The model of a verified artifact on torch's meta device, in eval mode.

    For a process that receives its part of the weights from another process.
    """
    folder = ModelFolder.of(model)
    with explain_failure(model.folder, "model"):
        model_class = model_class_of(folder)
        require_possible_size(folder, model_class)
        with private_folder(loadable_files(folder, model_class.config_class)) as private:
            config = model_class.config_class.from_pretrained(private, local_files_only=True)
        config.name_or_path = str(model.folder)
        empty = _without_weights(model_class, config)
    return empty.eval()


def meta_copy(model: Any) -> Any:
    """Another model of the same shape, settings and mode on torch's meta device; only buffers have values."""
    copy = _without_weights(type(model), model.config)
    copy.generation_config = model.generation_config
    return copy.train(model.training)


def _without_weights(model_class: Any, config: Any) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        empty = model_class(config)
    empty.tie_weights()  # each of two tied parameters was replaced by one of its own
    return empty


def model_class_of(model: ModelFolder) -> Any:
    """The class of transformers that ``config.json`` names; an auto_map beside it is never followed.

    Raises :class:`UserError` unless it is a causal language model's.
    """
    import transformers

    name = model.config["architectures"][0]
    model_class: Any = getattr(transformers, name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    code = "; code from its repository (auto_map) is never run" if "auto_map" in model.config else ""
    require(
        is_model,
        f"{model.folder}: transformers {transformers.__version__} has no class {name[:80]!r}{code}; "
        "take a model transformers knows",
    )
    require(
        model_class.can_generate() and model_class.config_class is not None,
        f"{model.folder}: {name} (config.json: architectures) is no causal language model; take one, "
        "e.g. a LlamaForCausalLM",
    )
    return model_class


class SizeLimit:
    """Counts the weights that a model registers, and raises :class:`DamagedError` once they are too many.

    ``stored`` values in ``tensors`` tensors are what there is for them; ``path`` is the file to blame.
    """

    def __init__(self, stored: int, tensors: int, path: Path):
        self.stored = stored
        self.path = path
        self.values_left = 4 * stored  # a weight may be tied, and may be registered twice
        self.tensors_left = 16 * tensors + 1000  # one may be stored for several

    def __call__(self, module: Any, name: str, parameter: Any) -> None:
        if parameter is not None:
            self.values_left -= parameter.numel()
            self.tensors_left -= 1
        if self.values_left < 0 or self.tensors_left < 0:
            described = f"describes a model of more values than the {self.stored:,} of the weights"
            raise DamagedError(f"{self.path}: {described}; take config.json and weights of the same model")


def require_possible_size(model: ModelFolder, model_class: Any) -> int:
    """Raise :class:`DamagedError` where the model that ``config.json`` describes has more values than the weights.

    Returns the values of the model, tied ones once.
    """
    stored = sum(math.prod(tensor.shape) for tensor in model.weights.values())
    path = model.folder / "config.json"
    check_layers(model.config, len(model.weights), path)
    config = model_class.config_class(**clean_config(model.config, is_method(model_class.config_class)))
    return count_values(model_class, config, SizeLimit(stored, len(model.weights), path))


def count_values(model_class: Any, config: Any, limit: SizeLimit) -> int:
    """How many values a model of ``config`` has, tied ones once: it is made without any, so that none takes memory.

    Raises :class:`DamagedError` as soon as it has more than the ``limit`` allows.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    require(not getattr(config, "is_encoder_decoder", False), f"{limit.path}: is_encoder_decoder: take a decoder only")
    handle = register_module_parameter_registration_hook(limit)
    try:
        empty = _without_values(model_class, config)
    finally:
        handle.remove()
    empty.tie_weights()
    buffers = sum(buffer.numel() for buffer in empty.buffers())
    if buffers > 2 * limit.stored + MOST_BUFFERS:
        raise DamagedError(
            f"{limit.path}: describes a model with {buffers:,} values that are no weights; fetch it again"
        )
    return sum(parameter.numel() for parameter in empty.parameters())


def _without_values(model_class: Any, config: Any) -> Any:
    """The model as transformers makes it before it loads weights: all on the meta device, buffers too."""
    import torch

    with ExitStack() as stack:
        for context in model_class.get_init_context(torch.float32, False, False, False):
            stack.enter_context(context)
        return model_class(config)


def _wrong_names(loaded: Any, info: dict[str, Any]) -> list[str]:
    """A sentence for each tensor that is missing (tied heads may be), unexpected or of another shape."""
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or [])
    wrong = [f"{name} is missing" for name in sorted(set(info["missing_keys"]) - tied)]
    wrong += [f"{name} is not the model's" for name in sorted(info["unexpected_keys"])]
    for name, actual, expected in sorted(info["mismatched_keys"]):
        wrong.append(f"{name} is {list(actual)}, expected {list(expected)}")
    head = loaded.get_output_embeddings()
    is_tied = getattr(loaded.config.get_text_config(), "tie_word_embeddings", False)
    if head is not None and is_tied and head.weight is not loaded.get_input_embeddings().weight:
        wrong.append("a head of its own, where config.json ties it to the embeddings")
    return wrong


def _wrong_dtypes(state: dict[str, Any], stored: dict[str, TensorInfo]) -> list[str]:
    """A sentence for each weight that is stored as numbers of another kind, which transformers would silently cast."""
    expected = " or ".join(FLOATS)
    return [
        f"{name} is {tensor.dtype}, expected {expected}"
        for name, tensor in stored.items()
        if name in state and state[name].is_floating_point() and tensor.dtype not in FLOATS
    ]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the chat template's closing token, the end token, and those of the model's settings."""
    additional = model.generation_config.eos_token_id
    if not isinstance(additional, list):
        additional = [] if additional is None else [additional]
    return sorted({tokenizer.eos_token_id, *closing_tokens(tokenizer), *additional})


def not_finite(state: dict[str, Any]) -> str | None:
    """Name of the first tensor with a NaN or an infinity."""
    import torch

    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Save weights (``dtype``, safetensors), configs, tokenizer with its chat template. Returns the manifest's facts.

    Raises :class:`UserError` if a weight is not finite, as computed or as rounded to ``dtype``.
    """
    import torch

    progress_bars.show_only_in_terminals()
    model = model.to(getattr(torch, dtype))
    if (name := not_finite(model.state_dict())) is not None:
        raise UserError(f"{folder}: tensor {name} is not finite in {dtype}; nothing was published")
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return model_facts(folder, tokenizer)


def model_facts(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Facts for the manifest that later steps and checks need without loading the model."""
    model = ModelFolder.of(folder)
    text = text_config(model.config)
    return {
        "architecture": model.config["architectures"][0],
        "hidden_size": text.get("hidden_size", text.get("n_embd")),
        "vocabulary_size": text.get("vocab_size"),
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "tokenizer_size": len(tokenizer),
        "parameters": sum(math.prod(tensor.shape) for tensor in model.weights.values()),
        "eos_token": tokenizer.eos_token,
        "max_positions": text.get("max_position_embeddings"),
    }


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of what makes vocabularies the same: vocabulary, merges, normaliser, pre-tokenizer; no added tokens."""
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    hashed = {key: body.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    vocabulary = hashed["model"].get("vocab")
    if isinstance(vocabulary, dict):
        added = {token["content"] for token in body.get("added_tokens", [])}
        vocabulary = {token: i for token, i in vocabulary.items() if token not in added}
    hashed["model"]["vocab"] = vocabulary
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


LOGIT_CHANGES = (  # settings of transformers' models that scale or cap logits behind the head
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


def require_linear_head(config: Any, folder: Path) -> None:
    """Raise :class:`UserError` for a model that changes logits behind its head.

    Losses and distributions are computed from the head alone, so that they would not be the model's own.
    """
    for name in LOGIT_CHANGES:
        value = getattr(config.get_text_config(), name, None)
        require(
            value in (None, 1.0),
            f"{folder}: {name} is {value}: it changes logits behind the head; "
            "such models can be neither trained nor cached",
        )
