"""What the options of all fusion targets, and of all merge methods, share. A plug-in adds its own in its file."""

from typing import ClassVar, Literal

from pydantic import Field

from llmfusion.study.schema.base import Address, Section, Share


class FusionOptions(Section):
    """Options of every fusion target; a target adds ``target: Literal[NAME]`` and its own."""

    target: str = Field(description="how teachers count: one of the targets above")

    weight: Share = Field(
        0.5, alias="lambda", description="weight of the fusion term: L = (1 - lambda) SFT + lambda fusion (eq. 7)"
    )
    temperature: float = Field(
        1.0, gt=0, description="softens teacher and student inside the fusion term only; no T^2 factor"
    )
    divergence: Literal["forward_kl", "reverse_kl", "js"] = Field(
        "forward_kl",
        description="between teacher and student: KL(teacher||student), KL(student||teacher), or Jensen-Shannon",
    )
    align: Literal["cma", "exact"] = Field(
        "cma",
        description="teachers of another vocabulary: cross-model attention (DSKD), or only tokens that cover the same "
        "text (DSKDv2)",
    )
    score: Literal["projected", "own"] = Field(
        "projected",
        description="by what udf and mince judge a teacher of another vocabulary: by its projection, or by its own "
        "cached statistics",
    )
    projector_lr: float = Field(
        1e-3, gt=0, lt=1, description="peak learning rate of the projectors, which teachers of another vocabulary need"
    )
    projector_steps: int = Field(0, ge=0, description="steps of the projectors alone, before the first step")


class MergeOptions(Section):
    """Options of every merge method; a method adds ``method: Literal[NAME]`` and its own.

    ``seconds_per_value`` is what the method's arithmetic takes on a core of 2.5 GHz, a value and model (for estimates).
    """

    recipe: ClassVar[int] = 3  # raised when the meaning of merging changes: what was merged before is then merged again
    seconds_per_value: ClassVar[float] = 9e-9

    pivot: Address = Field(description="the model all parents started from")
    parents: list[Address] = Field(min_length=1, description="models to merge")
    out_dtype: Literal["pivot", "float32", "bfloat16", "float16"] = Field(
        "pivot", description="of the merged weights; pivot: each tensor as in the pivot"
    )
    warn_below: float = Field(
        0.05,
        ge=0,
        le=1,
        description="warn where a merge keeps less of the deltas' squares, or changes a smaller share of the values",
    )
    method: str = Field(description="how deltas are combined: one of the methods below")
