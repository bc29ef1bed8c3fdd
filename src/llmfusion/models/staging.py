"""Base models that are not trained here: one function a kind, each fills a folder and returns its facts."""

import json
import os
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.data import hub
from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io import progress_bars
from llmfusion.io.files import link_or_copy, model_file, read_json_object
from llmfusion.io.gguf import read_gguf_header
from llmfusion.io.safetensors import FLOATS
from llmfusion.models.folder import ModelFolder, explain_failure, generation_settings, private_folder
from llmfusion.models.loading import (
    SizeLimit,
    count_values,
    load_tokenizer,
    model_class_of,
    model_facts,
    require_possible_size,
)
from llmfusion.study.schema.base_models import (
    MOST_MODEL_FILES,
    GgufModel,
    HubModel,
    PathModel,
    problem_of_file_name,
    taken_names,
)


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
        raise UserError(f"{hub.failure(base, 'could not be downloaded', error)} {hub.OFFLINE}") from error
    return _link_files(Path(downloaded), base, folder, chat_template)


def stage_folder(base: PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Link the files of a local folder, or copy them where the disk has no links. Returns the manifest's facts."""
    return _link_files(ROOT / base.path, base, folder, chat_template)


def stage_gguf(base: GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Convert a GGUF file into a float32 checkpoint (quantised weights are expanded). Returns the manifest's facts."""
    progress_bars.show_only_in_terminals()
    file = ROOT / base.path
    with explain_failure(file, "model"):
        require(file.suffix == ".gguf" and not file.is_dir(), f"{file}: is no .gguf file")
    model, tokenizer = _read_gguf(file)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    _drop_added_tokens(folder / "tokenizer.json", read_gguf_header(file).metadata["tokenizer.ggml.tokens"])
    return _facts_of(file, base, folder, chat_template)


def _drop_added_tokens(path: Path, tokens: int) -> None:
    """Take the added tokens behind the first ``tokens`` out of ``tokenizer.json``.

    transformers makes a GPT2Tokenizer of every byte-level vocabulary, and that adds GPT-2's ``<|endoftext|>`` where the
    file has none: one token more than Llama 3 has rows.
    """
    body = read_json_object(path)
    body["added_tokens"] = [token for token in body["added_tokens"] if token["id"] < tokens]
    path.write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file, whose header is checked before transformers sees the file.

    Raises :class:`UserError` for what is no complete model.
    """
    import torch
    import transformers

    header = read_gguf_header(file)
    with explain_failure(file, "model"), private_folder({"model.gguf": file}) as private:
        given: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        config = transformers.AutoConfig.from_pretrained(private, **given)
        mapping: Any = transformers.AutoModelForCausalLM
        model_class = mapping._model_mapping[type(config)]
        count_values(model_class, config, SizeLimit(header.values, len(header.tensors), file))
        given |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded, info = model_class.from_pretrained(private, **given)
        tied = set(getattr(loaded, "all_tied_weights_keys", None) or [])
        wrong = sorted(set(info["missing_keys"]) - tied) + [name for name, *_ in sorted(info["mismatched_keys"])]
        if wrong:
            needed = f"tensors that the model needs are missing or of another shape: {', '.join(wrong[:5])}"
            raise DamagedError(f"{file}: {needed}; fetch the file again, or convert the model again with llama.cpp")
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(loaded)(config)  # a fresh model of the same shape: the loaded one is marked as quantised
        plain.load_state_dict(loaded.state_dict())
        tokenizer = transformers.AutoTokenizer.from_pretrained(private, gguf_file="model.gguf", local_files_only=True)
    return plain, tokenizer


def taken_files(source: Path) -> list[Path]:
    """The files of a folder that are staged, by name. Raises :class:`UserError` for one that is no plain file."""
    with explain_failure(source, "model"):
        require(source.is_dir(), f"{source}: is no folder")
        os.listdir(source)  # a glob has no error for a folder that nobody may read
        names = taken_names(source)
        most = f"{source}: has {len(names):,} files that belong to a model, expected at most {MOST_MODEL_FILES:,}"
        require(len(names) <= MOST_MODEL_FILES, f"{most}; take a folder of one model")
        for name in names:
            if (problem := problem_of_file_name(name)) is not None:
                raise UserError(f"{source}: the file {name!r} has a name that {problem}; rename it")
        return [model_file(source, name) for name in names]


def _link_files(source: Path, base: HubModel | PathModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    """Take over a checkpoint's files. Raises :class:`UserError` where weights or ``config.json`` are missing."""
    files = taken_files(source)
    names = {file.name for file in files}
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(path.name for path in source.glob("*.bin"))
        refused = f" (pickled weights are refused: {pickles[0]})" if pickles else ""
        raise UserError(f"{source}: has no .safetensors weights{refused}")
    require("config.json" in names, f"{source}: has no config.json")
    for file in files:
        with explain_failure(source, "model"):
            link_or_copy(file.resolve(), folder / file.name)
    return _facts_of(source, base, folder, chat_template)


def _facts_of(
    source: Path, base: HubModel | PathModel | GgufModel, folder: Path, chat_template: str | None
) -> dict[str, Any]:
    """The manifest's facts; what is wrong is said of the ``source``, which is what the user has."""
    try:
        return _facts(base, folder, chat_template)
    except UserError as error:
        raise type(error)(str(error).replace(str(folder), str(source))) from error


def _facts(base: HubModel | PathModel | GgufModel, folder: Path, chat_template: str | None) -> dict[str, Any]:
    model = ModelFolder.of(folder)
    with explain_failure(folder, "model"):
        _require_known_dtypes(model)
        generation_settings(model)
        needed = require_possible_size(model, model_class_of(model))
        tokenizer = load_tokenizer(folder, chat_template)
        facts = model_facts(folder, tokenizer)
        largest_id = max([*tokenizer.get_vocab().values(), *tokenizer.encode("a")])
    stored = facts["parameters"]
    require(
        needed <= stored,
        f"{folder / 'config.json'}: describes a model of {needed:,} values, the weights beside it have {stored:,}; "
        "take config.json and weights of the same model",
    )
    tokens = max(facts["tokenizer_size"], largest_id + 1)
    rows = facts["vocabulary_size"]
    require(tokens <= (rows or 0), f"{folder}: the tokenizer has {tokens} tokens, the model only {rows} rows for them")
    return {**facts, "license": base.license}


def _require_known_dtypes(model: ModelFolder) -> None:
    """Raise :class:`UserError` for weights in numbers that no training and no merge computes with."""
    for name, tensor in model.weights.items():
        is_weight = tensor.dtype in FLOATS or tensor.dtype[0] in "IUB"  # integers and flags: buffers
        expected = f"expected {' or '.join(FLOATS)}; take the weights in one of these"
        require(is_weight, f"{tensor.file}: tensor {name} is {tensor.dtype[:80]}, {expected}")
