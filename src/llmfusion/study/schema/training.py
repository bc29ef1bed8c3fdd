"""Trainings: from scratch, or of a pivot, alone or with teachers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmfusion.study.schema.base import Address, Name, Positive, Section, Share
from llmfusion.study.schema.fusion import Fusion


class Training(Section):
    """What every training states, from scratch or from an earlier model."""

    mix: Name = Field(description="the mix it is trained on")
    epochs: Positive | None = Field(None, description="passes over the data; give epochs or steps")
    steps: Positive | None = Field(None, description="optimizer steps; give epochs or steps")
    batch_size: Positive = Field(16, description="samples in an optimizer step")
    micro_batch_size: Positive | None = Field(
        None, description="samples in one forward pass; smaller means less memory. Default: batch_size"
    )
    micro_batch_tokens: Positive | None = Field(
        None,
        description="instead: tokens in one forward pass, padding included; each step's samples are sorted by length, "
        "so that there is little of it",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input and compute the rest again: less memory, a third more time"
    )
    optimizer: Literal["c_adamw", "adamw"] = Field("c_adamw", description="cautious AdamW (the paper's) or AdamW")
    cautious_norm: Literal["mean_clamp", "numel_plus_1"] = Field(
        "mean_clamp",
        description="C-AdamW's mask: divided by max(mean, 1e-3), or times n/(sum + 1) as in its first release",
    )
    lr: float = Field(gt=0, lt=1, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate goes on after the warm-up"
    )
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
        "float32",
        description="of the weights; bfloat16 halves them and their gradients and is refused at learning rates whose "
        "steps it would round away",
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of the saved weights; parents of merges need float32"
    )
    seed: int = Field(42, description="seed of the data order (and of the weights, from scratch)")
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes of one node, a GPU each, that share the samples of every step"
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="none: each process holds the whole model; full: its part of every weight, gradient and moment "
        "(FSDP)",
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
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of processes {self.processes}, which share it"
            )
        if self.sharding == "full" and self.processes == 1:
            raise ValueError("sharding: full splits the model over processes; give processes: 2 or more")
        if self.micro_batch_size and self.micro_batch_tokens:
            raise ValueError("give micro_batch_size or micro_batch_tokens, not both")
        if self.micro_batch_size and self.batch_size // self.processes % self.micro_batch_size:
            shared = f" / {self.processes} processes" if self.processes > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size}{shared} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class TrainedModel(Training):
    """A training of a pivot: SFT, SeqKD, or a fusion with teachers."""

    init: Address = Field(description="the model it starts from: the pivot")
    generated: list[Address] = Field(
        [], description="SeqKD: also train on what these models answer to the mix's prompts"
    )
    teachers: list[Address] = Field([], description="models whose cached states it is fused with")
    fusion: Fusion | None = Field(
        None, description="how the teachers are used; needed with teachers, forbidden without"
    )

    @model_validator(mode="after")
    def _fused(self) -> "TrainedModel":
        if bool(self.teachers) != (self.fusion is not None):
            raise ValueError("teachers and fusion go together: give both or neither")
        return self
