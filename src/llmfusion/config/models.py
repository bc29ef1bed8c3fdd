"""What a study may say: one pydantic model a section. `config/schema.json`, the checks and the docs all come from here.

Every key has a description; a default, once released, never changes, because artifacts leave defaults out of their spec.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llmfusion.config.data import Address, Commit, Dataset, Licensed, Mix, Name, Positive, Section, Share, Task, template_fields
from llmfusion.config.merging import Merge


# ---------------------------------------------------------------------------------------------------------------- models
class Training(Section):
    """What every training states, from scratch or from an earlier model."""

    mix: Name = Field(description="the mix it is trained on")
    epochs: Positive | None = Field(None, description="passes over the data; give epochs or steps")
    steps: Positive | None = Field(None, description="optimizer steps; give epochs or steps")
    batch_size: Positive = Field(16, description="samples in an optimizer step")
    micro_batch_size: Positive | None = Field(None, description="samples in one forward pass; smaller means less memory. Default: batch_size")
    micro_batch_tokens: Positive | None = Field(
        None, description="instead: tokens in one forward pass, padding included; each step's samples are sorted by length, so that there is little of it"
    )
    activation_checkpointing: bool = Field(False, description="keep only each layer's input and compute the rest again: less memory, a third more time")
    optimizer: Literal["c_adamw", "adamw"] = Field("c_adamw", description="cautious AdamW (the paper's) or AdamW")
    cautious_norm: Literal["mean_clamp", "numel_plus_1"] = Field(
        "mean_clamp", description="C-AdamW's mask: divided by max(mean, 1e-3), or times n/(sum + 1) as in its first release"
    )
    lr: float = Field(gt=0, lt=1, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate goes on after the warm-up")
    lr_min: float = Field(0.0, ge=0, lt=1, description="learning rate at the end of the cosine or line")
    warmup: Share = Field(0.0, description="share of the steps in which the rate rises linearly from 0")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="decay of the first and second moment"
    )
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on every parameter")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the computation (autocast)")
    parameters: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 halves them and their gradients and is refused at learning rates whose steps it would round away"
    )
    save_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the saved weights; parents of merges need float32")
    seed: int = Field(42, description="seed of the data order (and of the weights, from scratch)")
    processes: Annotated[int, Field(ge=1, le=64)] = Field(1, description="processes of one node, a GPU each, that share the samples of every step")
    sharding: Literal["none", "full"] = Field(
        "none", description="none: each process holds the whole model; full: its part of every weight, gradient and moment (FSDP)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.schedule == "constant" and self.lr_min:
            raise ValueError(f"lr_min {self.lr_min} is never reached with schedule: constant; leave it out")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min {self.lr_min} is above lr {self.lr}")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of processes {self.processes}, which share it")
        if self.sharding == "full" and self.processes == 1:
            raise ValueError("sharding: full splits the model over processes; give processes: 2 or more")
        if self.micro_batch_size and self.micro_batch_tokens:
            raise ValueError("give micro_batch_size or micro_batch_tokens, not both")
        if self.micro_batch_size and self.batch_size // self.processes % self.micro_batch_size:
            shared = f" / {self.processes} processes" if self.processes > 1 else ""
            raise ValueError(f"batch_size {self.batch_size}{shared} is no multiple of micro_batch_size {self.micro_batch_size}")
        return self


class HubModel(Licensed):
    kind: Literal["hub"] = Field(description="a model repository on the Hugging Face hub")
    repo: str = Field(pattern=r"^[^/\s]+/[^/\s]+$", description="repository id, e.g. meta-llama/Llama-3.1-8B")
    revision: Commit = Field(description="the repository's commit, 40 hex digits")
    vocabulary: Name = Field(description="models with the same word here share one tokenizer (checked when they are staged)")


class PathModel(Licensed):
    kind: Literal["path"] = Field(description="a local folder with config.json, tokenizer and safetensors weights")
    path: str = Field(min_length=1, description="the folder, relative to the repository root, or absolute")
    vocabulary: Name = Field(description="models with the same word here share one tokenizer (checked when they are staged)")


class GgufModel(Licensed):
    kind: Literal["gguf"] = Field(description="a .gguf file, converted to safetensors when it is staged")
    path: str = Field(min_length=1, description="the file, relative to the repository root, or absolute")
    vocabulary: Name = Field(description="models with the same word here share one tokenizer (checked when they are staged)")


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
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}")
        return self


class Tokenizer(Section):
    vocabulary_size: Annotated[int, Field(ge=260)] = Field(description="byte-level BPE vocabulary, special tokens included")
    digits: Annotated[int, Field(ge=1, le=3)] = Field(3, description="longest run of digits that may become one token")


class ScratchModel(Training):
    kind: Literal["scratch"] = Field(description="trained here: from random weights, or from another base model")
    init: Address | None = Field(None, description="start from this base model, with its tokenizer; without it, architecture and tokenizer are needed")
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


class _Fusion(Section):
    weight: Share = Field(0.5, alias="lambda", description="weight of the fusion term: L = (1 - lambda) SFT + lambda fusion (eq. 7)")
    temperature: float = Field(1.0, gt=0, description="softens teacher and student inside the fusion term only; no T^2 factor")
    divergence: Literal["forward_kl", "reverse_kl", "js"] = Field(
        "forward_kl", description="between teacher and student: KL(teacher||student), KL(student||teacher), or Jensen-Shannon"
    )
    align: Literal["cma", "exact"] = Field(
        "cma", description="teachers of another vocabulary: cross-model attention (DSKD), or only tokens that cover the same text (DSKDv2)"
    )
    score: Literal["projected", "own"] = Field(
        "projected", description="by what udf and mince judge a teacher of another vocabulary: by its projection, or by its own cached statistics"
    )
    projector_lr: float = Field(1e-3, gt=0, lt=1, description="peak learning rate of the projectors, which teachers of another vocabulary need")
    projector_steps: int = Field(0, ge=0, description="steps of the projectors alone, before the first step")


class KdTarget(_Fusion):
    target: Literal["kd"] = Field(description="one teacher's distribution (Hinton)")


class NaiveTarget(_Fusion):
    target: Literal["naive"] = Field(description="the teachers' KD losses, summed")
    reduction: Literal["sum", "mean"] = Field("sum", description="sum (the paper) or mean over the teachers")


class MinceTarget(_Fusion):
    target: Literal["mince"] = Field(description="the teacher with the lowest cross-entropy on the response (FuseLLM)")
    granularity: Literal["sequence", "token"] = Field("sequence", description="choose once a sample (FuseLLM's code) or at every token")


class UdfTarget(_Fusion):
    target: Literal["udf"] = Field(description="teachers weighted by 1 / (entropy + cross-entropy) at every token (eq. 5)")
    epsilon: float = Field(1e-6, gt=0, description="added to entropy + cross-entropy, in nats")


class MinilogitTarget(_Fusion):
    target: Literal["minilogit"] = Field(description="element-wise minimum of the teachers' logits relative to the gold token (KDCL)")


Fusion = Annotated[KdTarget | NaiveTarget | MinceTarget | UdfTarget | MinilogitTarget, Field(discriminator="target")]


class TrainedModel(Training):
    init: Address = Field(description="the model it starts from: the pivot")
    generated: list[Address] = Field([], description="SeqKD: also train on what these models answer to the mix's prompts")
    teachers: list[Address] = Field([], description="models whose cached states it is fused with")
    fusion: Fusion | None = Field(None, description="how the teachers are used; needed with teachers, forbidden without")

    @model_validator(mode="after")
    def _fused(self) -> "TrainedModel":
        if bool(self.teachers) != (self.fusion is not None):
            raise ValueError("teachers and fusion go together: give both or neither")
        return self


class Models(Section):
    base: dict[Name, BaseModelEntry] = Field(min_length=1, description="pivot and sources: staged, or trained from scratch")
    trained: dict[Name, TrainedModel] = Field({}, description="models trained from the pivot: SFT, SeqKD, knowledge and unified fusion")
    merged: dict[Name, Merge] = Field({}, description="merges of trained models")


# ------------------------------------------------------------------------------------------------------ the study's own keys
class Capture(Section):
    kind: Literal["hidden", "topk", "online"] = Field(
        "hidden",
        description="what is kept of a teacher: its final hidden states (exact), its k most likely tokens (smaller, a part of the distribution), "
        "or neither: then every training loads the teacher itself",
    )
    k: Positive = Field(10, description="for kind topk: how many tokens are kept at each position")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the cached hidden states and of the teacher's weights in the pass")
    batch_size: Positive = Field(16, description="samples in one forward pass of a teacher")
    shards: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="jobs that share a teacher's pass over a mix; the cache is the same whatever their number"
    )

    @model_validator(mode="after")
    def _counted(self) -> "Capture":
        if self.kind != "topk" and self.k != 10:
            raise ValueError(f"k has no meaning with kind {self.kind}; it belongs to kind topk")
        return self


class Generation(Section):
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model that answers")
    batch_size: Positive = Field(32, description="prompts answered at once")


class Answering(Section):
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model that is scored")
    batch_size: Positive = Field(32, description="items asked at once")


class Row(Section):
    model: Address | Annotated[list[Address], Field(min_length=2)] = Field(
        description="the model of this row, or its replicates (the same method with other seeds): the row is then their mean"
    )
    category: str = Field(description="block of the table")
    label: str = Field(description="what the row is called")

    @property
    def models(self) -> list[str]:
        """The replicates, or the one model."""
        return self.model if isinstance(self.model, list) else [self.model]


class Table(Section):
    tasks: list[Name] = Field(min_length=1, description="columns, in order")
    reference: Address | None = Field(None, description="the row that averages are compared with, in per cent (the paper: SFT)")
    rows: list[Row] = Field(min_length=1, description="rows, in order")


class Study(Section):
    """One study: everything the workflow needs to know, in one file."""

    title: str = Field(min_length=1, description="one line that says what is studied")
    scale: Literal["paper", "miniature"] = Field(description="miniature numbers are labelled as such everywhere")
    directory: str = Field(min_length=1, description="where results/, work/ and logs/ go, relative to the repository root, or absolute")
    chat_template: str = Field("neutral", description="for models without one: neutral (User/Assistant), or a Jinja template")
    capture: Capture = Field(Capture(), description="how teachers are cached")
    generation: Generation = Field(Generation(), description="how SeqKD answers are made (greedy)")
    answering: Answering = Field(Answering(), description="how models are asked (greedy)")
    datasets: dict[Name, Dataset] = Field(min_length=1, description="data to train on")
    mixes: dict[Name, Mix] = Field(min_length=1, description="samples drawn from datasets")
    tasks: dict[Name, Task] = Field(min_length=1, description="tests")
    batches: dict[Name, list[Name]] = Field(min_length=1, description="tasks that one job asks, the model loaded once; each task in exactly one batch")
    models: Models = Field(description="all models, by kind; addressed as KIND/NAME")
    tables: dict[Name, Table] = Field(min_length=1, description="tables: models against tasks")

    @field_validator("chat_template")
    @classmethod
    def _template(cls, text: str) -> str:
        if text != "neutral":
            if "{{" not in text:
                raise ValueError(f"got {text!r}; expected neutral, or a Jinja template that prints the messages with {{{{ ... }}}}")
            template_fields(text)
        return text
