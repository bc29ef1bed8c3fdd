"""Base models that are not trained here: one function a kind, each fills a folder and returns its facts."""

from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.data import hub
from llmfusion.errors import UserError, require
from llmfusion.io import progress_bars
from llmfusion.io.files import link_or_copy
from llmfusion.models.loading import load_tokenizer, model_facts
from llmfusion.study.schema.base_models import MODEL_FILES, GgufModel, HubModel, PathModel


def stage_hub(base: HubModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Download a repository at its pinned commit: configs, tokenizer and safetensors, never code or pickles.

    Returns the manifest's facts. Raises :class:`UserError` with the hub's reason where it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    progress_bars.show_only_in_terminals()
    hub.require_room(base, folder)
    try:
        downloaded = snapshot_download(
            base.repo, revision=base.revision, allow_patterns=hub.MODEL_ALLOWED, ignore_patterns=hub.MODEL_IGNORED
        )
    except Exception as error:  # of many types, from many layers; the user needs its message and what to do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{base.repo} at {base.revision[:12]}: could not be downloaded: {reason}. Is this machine online, the "
            "licence accepted on the hub and HF_TOKEN set? Offline, download it elsewhere and use kind: path"
        ) from error
    return _link_files(Path(downloaded), base, folder, chat_template)


def stage_folder(base: PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Link the files of a local folder, or copy them where the disk has no links. Returns the manifest's facts."""
    return _link_files(ROOT / base.path, base, folder, chat_template)


def stage_gguf(base: GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Convert a GGUF file into a float32 checkpoint (quantised weights are expanded). Returns the manifest's facts."""
    import torch
    import transformers

    progress_bars.show_only_in_terminals()
    file = ROOT / base.path
    require(file.is_file() and file.suffix == ".gguf", f"{file}: is no .gguf file")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)  # a fresh model of the same shape: the loaded one is marked as quantised
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return _facts(base, folder, chat_template)


def _link_files(source: Path, base: HubModel | PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Take over a checkpoint's files. Raises :class:`UserError` where weights or ``config.json`` are missing."""
    require(source.is_dir(), f"{source}: is no folder")
    files = sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        pickles = sorted(path.name for path in source.glob("*.bin"))
        refused = f" (pickled weights are refused: {pickles[0]})" if pickles else ""
        raise UserError(f"{source}: has no .safetensors weights{refused}")
    require((source / "config.json").exists(), f"{source}: has no config.json")
    for file in files:
        link_or_copy(file.resolve(), folder / file.name)
    return _facts(base, folder, chat_template)


def _facts(base: HubModel | PathModel | GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder, chat_template)
    facts = model_facts(folder, tokenizer)
    tokens = facts["tokenizer_size"]
    rows = facts["vocabulary_size"]
    require(tokens <= (rows or 0), f"the tokenizer has {tokens} tokens, the model only {rows} rows for them")
    return {**facts, "license": base.license}
