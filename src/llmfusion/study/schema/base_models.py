"""Base models: staged from the hub, a folder or a GGUF file, or trained from scratch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmfusion import ROOT
from llmfusion.study.schema.base import REPOSITORY, Address, Commit, FilePath, Licensed, Name, Positive, Section
from llmfusion.study.schema.training import Training


class Staged(Licensed):
    """A base model that is not trained here."""

    parameters: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="how many it has, for estimates while neither its files nor its name (8B, 135M) tell; "
        "what is made does not depend on it",
    )
    active_parameters: Annotated[float, Field(gt=0)] | None = Field(
        None, description="those that one token passes through, of a mixture of experts; for estimates as well"
    )

    @model_validator(mode="after")
    def _experts(self) -> "Staged":
        if self.active_parameters is not None and self.active_parameters > (self.parameters or 0):
            raise ValueError("active_parameters are a part of parameters: give both, the larger number as parameters")
        return self


SIZE_KEYS = ("parameters", "active_parameters")  # for estimates only: they are no part of what is made


class HubModel(Staged):
    kind: Literal["hub"] = Field(description="a model repository on the Hugging Face hub")
    repo: str = Field(pattern=REPOSITORY, description="repository id, e.g. meta-llama/Llama-3.1-8B")
    revision: Commit = Field(description="the repository's commit, 40 hex digits")
    vocabulary: Name = Field(
        description="models with the same word here share one tokenizer (checked when they are staged)"
    )


class PathModel(Staged):
    kind: Literal["path"] = Field(description="a local folder with config.json, tokenizer and safetensors weights")
    path: FilePath = Field(description="the folder, relative to the repository root, or absolute")
    vocabulary: Name = Field(
        description="models with the same word here share one tokenizer (checked when they are staged)"
    )


class GgufModel(Staged):
    kind: Literal["gguf"] = Field(description="a .gguf file, converted to safetensors when it is staged")
    path: FilePath = Field(description="the file, relative to the repository root, or absolute")
    vocabulary: Name = Field(
        description="models with the same word here share one tokenizer (checked when they are staged)"
    )


class Architecture(Section):
    model_type: Literal["llama", "qwen2", "gpt_neox"] = Field(description="family, as transformers names it")
    hidden_size: Positive = Field(description="width")
    intermediate_size: Positive = Field(description="width of the MLP")
    num_hidden_layers: Positive = Field(description="depth")
    num_attention_heads: Positive = Field(description="attention heads")
    num_key_value_heads: Positive | None = Field(None, description="key-value heads (llama, qwen2)")
    max_position_embeddings: Positive = Field(description="longest input in tokens")
    tie_word_embeddings: bool = Field(False, description="one matrix for embeddings and head")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _divides(self) -> "Architecture":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"{heads} is no multiple of num_key_value_heads {self.num_key_value_heads}")
        return self


class Tokenizer(Section):
    vocabulary_size: Annotated[int, Field(ge=260)] = Field(
        description="byte-level BPE vocabulary, special tokens included"
    )
    digits: Annotated[int, Field(ge=1, le=3)] = Field(3, description="longest run of digits that may become one token")


class ScratchModel(Training):
    kind: Literal["scratch"] = Field(description="trained here: from random weights, or from another base model")
    init: Address | None = Field(
        None,
        description="start from this base model, with its tokenizer; without it, architecture and tokenizer are needed",
    )
    architecture: Architecture | None = Field(None, description="shape of a model trained from random weights")
    tokenizer: Tokenizer | None = Field(None, description="tokenizer to train on the mix")

    @model_validator(mode="after")
    def _start(self) -> "ScratchModel":
        if (self.init is None) != (self.architecture is not None and self.tokenizer is not None):
            raise ValueError("give either init, or architecture and tokenizer")
        if self.init is not None and (self.architecture or self.tokenizer):
            raise ValueError("architecture and tokenizer come from init; leave them out")
        return self


BaseModelEntry = Annotated[HubModel | PathModel | GgufModel | ScratchModel, Field(discriminator="kind")]

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")  # never code or pickles
MOST_MODEL_FILES = 1000  # of a folder; all stand on the command line of the job that stages them


def model_files(entry: HubModel | PathModel | GgufModel | ScratchModel) -> list[str]:
    """Files outside the study that a base model is staged from; of a folder that does not exist its ``config.json``."""
    if isinstance(entry, GgufModel):
        return [entry.path]
    if not isinstance(entry, PathModel):
        return []
    names = taken_names(ROOT / entry.path)
    if len(names) > MOST_MODEL_FILES or any(problem_of_file_name(name) for name in names):
        names = []  # the job that stages the folder says what is wrong with it
    return [f"{entry.path}/{name}" for name in names or ["config.json"]]


def taken_names(folder: Path) -> list[str]:
    """Names of the files of a model's folder that are staged."""
    return sorted({path.name for pattern in MODEL_FILES for path in folder.glob(pattern)})


def problem_of_file_name(name: str) -> str | None:
    """Why a file of a model's folder cannot be staged under its name; None where it can."""
    if not name.isprintable():
        return "cannot be printed"
    return "has braces, which are wildcards to Snakemake" if "{" in name or "}" in name else None
