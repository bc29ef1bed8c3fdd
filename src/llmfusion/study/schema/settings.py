"""Settings of the whole study: how teachers are cached, answers generated, and models asked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmfusion.study.schema.base import Positive, Section


class Capture(Section):
    """How teachers are cached."""

    kind: Literal["hidden", "topk", "online"] = Field(
        "hidden",
        description="what is kept of a teacher: its final hidden states (exact), its k most likely tokens (smaller, a "
        "part of the distribution), or neither: then every training loads the teacher itself",
    )
    k: Positive = Field(10, description="for kind topk: how many tokens are kept at each position")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of the cached hidden states and of the teacher's weights in the pass"
    )
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
    """How SeqKD answers are made."""

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model that answers")
    batch_size: Positive = Field(32, description="prompts answered at once")


class Answering(Section):
    """How models are asked."""

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model that is scored")
    batch_size: Positive = Field(32, description="items asked at once")
