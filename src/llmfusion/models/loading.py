"""Load and save models and tokenizers with the checks transformers leaves out.

transformers loads a checkpoint with a missing tensor (filled at random), an extra one or a NaN without an error. Here the
files are verified against the manifest first (:func:`llmfusion.artifacts.read`), no tensor may be missing or unexpected,
and all values must be finite. Remote code is never run and pickled weights are never read.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from llmfusion.artifacts import Artifact, require
from llmfusion.data.chat import TEMPLATES
from llmfusion.errors import DamagedError, UserError


def load_tokenizer(model: Artifact | Path, chat_template: str | None) -> Any:
    """The model's tokenizer; without a chat template of its own it gets the study's (a name, or Jinja text)."""
    import transformers

    folder = model.folder if isinstance(model, Artifact) else model
    settings = folder / "tokenizer_config.json"
    name = json.loads(settings.read_bytes()).get("tokenizer_class") or "" if settings.exists() else ""
    kind: Any = getattr(transformers, name, None) or transformers.AutoTokenizer  # the class itself: Auto imports every family
    tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    require(tokenizer.eos_token_id is not None, f"{folder}: the tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are marked by position, never by id
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATES.get(chat_template or "neutral", chat_template)
    return tokenizer


def load_model(model: Artifact, dtype: str) -> Any:
    """The model of a verified artifact in ``dtype`` (float32 or bfloat16), in eval mode, on the CPU.

    Raises :class:`DamagedError` for missing, unexpected or misshapen tensors, :class:`UserError` for values that are not
    finite and for what transformers cannot load without running code or unpickling from the checkpoint.
    """
    import torch
    import transformers

    model.file("config.json")
    config = json.loads((model.folder / "config.json").read_bytes())
    name = (config.get("architectures") or ["?"])[0]
    kind: Any = getattr(transformers, name, None)  # where transformers has the class, an auto_map beside it is not followed
    code = "; code from its repository (auto_map) is never run" if "auto_map" in config else ""
    require(kind is not None, f"{model.folder}: transformers {transformers.__version__} has no class {name!r}{code}; take a model transformers knows")
    require(any(model.folder.glob("*.safetensors")), f"{model.folder}: has no .safetensors weights; pickled weights are never read")
    loaded, info = kind.from_pretrained(
        model.folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True,
        ignore_mismatched_sizes=True, output_loading_info=True,  # mismatches are told, and refused below with all others
    )  # fmt: skip
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or [])
    missing = sorted(set(info["missing_keys"]) - tied)
    wrong = missing + sorted(info["unexpected_keys"]) + [str(k) for k in sorted(info.get("mismatched_keys", []))]
    if wrong:
        raise DamagedError(f"{model.folder}: {len(wrong)} tensors missing, unexpected or of another shape: {', '.join(wrong[:5])}")
    require_finite(loaded, str(model.folder))
    return loaded.eval()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, and those the model's own generation settings add."""
    more = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])})


def require_finite(model: Any, where: str) -> None:
    """Raise :class:`UserError` naming the first tensor with a NaN or an infinity."""
    import torch

    for name, tensor in model.state_dict().items():
        if torch.is_floating_point(tensor) and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: tensor {name} is not finite; nothing was published")


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Save weights (``dtype``, safetensors), configs and tokenizer with its chat template. Returns facts for the manifest."""
    import torch

    require_finite(model, str(folder))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return model_facts(folder, tokenizer)


def model_facts(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What later steps and checks want to know without loading the model."""
    config = json.loads((folder / "config.json").read_bytes())
    text = config.get("text_config", config)
    return {
        "architecture": (config.get("architectures") or ["?"])[0],
        "hidden_size": text.get("hidden_size"),
        "vocabulary_size": text.get("vocab_size"),
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "tokenizer_size": len(tokenizer),
        "parameters": sum(count_parameters(path) for path in folder.glob("*.safetensors")),
        "eos_token": tokenizer.eos_token,
        "max_positions": text.get("max_position_embeddings"),
    }


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of what makes two vocabularies the same: base vocabulary, merges, normaliser and pre-tokenizer, not added tokens."""
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    same = {key: body.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    added = {token["content"] for token in body.get("added_tokens", [])}
    same["model"]["vocab"] = (
        {k: v for k, v in same["model"]["vocab"].items() if k not in added} if isinstance(same["model"].get("vocab"), dict) else same["model"].get("vocab")
    )
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total
