"""Base models: one function a kind (``hub``, ``path``, ``gguf``, ``scratch``), each fills a folder and returns its facts."""

from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.errors import UserError, require
from llmfusion.io.files import link_or_copy
from llmfusion.models.loading import load_tokenizer, model_facts
from llmfusion.study.schema.base_models import MODEL_FILES, GgufModel, HubModel, PathModel


def stage_hub(base: HubModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Download a repository at its pinned commit: configs, tokenizer and safetensors, never code or pickles."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            base.repo, revision=base.revision, allow_patterns=list(MODEL_FILES), ignore_patterns=["original/*"]
        )
    except Exception as error:  # many kinds from many layers; the user needs its words and the way out
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{base.repo} at {base.revision[:12]}: could not be downloaded: {told}. Is this machine online, the licence accepted "
            "on the hub and HF_TOKEN set? Offline, download it elsewhere and use kind: path"
        ) from error
    return _take(Path(found), base, folder, chat_template)


def stage_folder(base: PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Take over a local folder (linked where the disk allows, copied else)."""
    return _take(ROOT / base.path, base, folder, chat_template)


def stage_gguf(base: GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Convert a GGUF file into a float32 checkpoint (quantised weights are expanded)."""
    import torch
    import transformers

    file = ROOT / base.path
    require(file.is_file() and file.suffix == ".gguf", f"{file}: is no .gguf file")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)  # a fresh model of the same shape: the loaded one remembers that it was quantised
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return _facts(base, folder, chat_template)


def _take(source: Path, base: HubModel | PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    require(source.is_dir(), f"{source}: is no folder")
    files = sorted({p for pattern in MODEL_FILES for p in source.glob(pattern)})
    pickles = sorted(p.name for p in source.glob("*.bin"))
    weights = [p for p in files if p.suffix == ".safetensors"]
    require(
        bool(weights),
        f"{source}: has no .safetensors weights{f' (pickled weights are refused: {pickles[0]})' if pickles else ''}",
    )
    require((source / "config.json").exists(), f"{source}: has no config.json")
    for file in files:
        link_or_copy(file.resolve(), folder / file.name)
    return _facts(base, folder, chat_template)


def _facts(base: HubModel | PathModel | GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder, chat_template)
    facts = model_facts(folder, tokenizer)
    require(
        facts["tokenizer_size"] <= (facts["vocabulary_size"] or 0),
        f"the tokenizer has {facts['tokenizer_size']} tokens, the model only {facts['vocabulary_size']} rows for them",
    )
    return {**facts, "license": base.license}
