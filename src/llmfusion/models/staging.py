"""Base models: one function a kind (``hub``, ``path``, ``gguf``, ``scratch``), each fills a folder and returns its facts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.artifacts import require
from llmfusion.config.plan import MODEL_FILES
from llmfusion.errors import UserError
from llmfusion.models.loading import load_tokenizer, model_facts
from llmfusion.step import Job


def hub(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Download a repository at its pinned commit: configs, tokenizer and safetensors, never code or pickles."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(spec["repo"], revision=spec["revision"], allow_patterns=list(MODEL_FILES), ignore_patterns=["original/*"])
    except Exception as error:  # many kinds from many layers; the user needs its words and the way out
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{spec['repo']} at {spec['revision'][:12]}: could not be downloaded: {told}. Is this machine online, the licence accepted "
            "on the hub and HF_TOKEN set? Offline, download it elsewhere and use kind: path"
        ) from error
    return _take(Path(found), job, spec)


def path(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Take over a local folder (linked where the disk allows, copied else)."""
    return _take(ROOT / spec["path"], job, spec)


def gguf(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Convert a GGUF file into a float32 checkpoint (quantised weights are expanded)."""
    import torch
    import transformers

    file = ROOT / spec["path"]
    require(file.is_file() and file.suffix == ".gguf", f"{file}: is no .gguf file")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)  # a fresh model of the same shape: the loaded one remembers that it was quantised
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(job.folder, max_shard_size="4GB")
    tokenizer.save_pretrained(job.folder)
    return _facts(job, spec)


def scratch(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    """Train a base model here, from random weights or from another base model."""
    from llmfusion.models.scratch import train_base

    return train_base(job, spec)


KINDS: dict[str, Callable[[Job, dict[str, Any]], dict[str, Any]]] = {"hub": hub, "path": path, "gguf": gguf, "scratch": scratch}


def _take(source: Path, job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    require(source.is_dir(), f"{source}: is no folder")
    files = sorted({p for pattern in MODEL_FILES for p in source.glob(pattern)})
    pickles = sorted(p.name for p in source.glob("*.bin"))
    weights = [p for p in files if p.suffix == ".safetensors"]
    require(bool(weights), f"{source}: has no .safetensors weights{f' (pickled weights are refused: {pickles[0]})' if pickles else ''}")
    require((source / "config.json").exists(), f"{source}: has no config.json")
    for file in files:
        _link(file.resolve(), job.folder / file.name)
    return _facts(job, spec)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _facts(job: Job, spec: dict[str, Any]) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.folder, job.spec.get("chat_template"))
    facts = model_facts(job.folder, tokenizer)
    require(
        facts["tokenizer_size"] <= (facts["vocabulary_size"] or 0),
        f"the tokenizer has {facts['tokenizer_size']} tokens, the model only {facts['vocabulary_size']} rows for them",
    )
    return {**facts, "license": spec["license"]}
