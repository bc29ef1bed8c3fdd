"""How teachers are fused: the options of one of the targets in :mod:`llmfusion.fusion.targets`."""

from typing import Annotated, Literal

from pydantic import Field

from llmfusion.study.schema.options import FusionOptions


class KdTarget(FusionOptions):
    target: Literal["kd"] = Field(description="one teacher's distribution (Hinton)")


class NaiveTarget(FusionOptions):
    target: Literal["naive"] = Field(description="the teachers' KD losses, summed")
    reduction: Literal["sum", "mean"] = Field("sum", description="sum (the paper) or mean over the teachers")


class MinceTarget(FusionOptions):
    target: Literal["mince"] = Field(description="the teacher with the lowest cross-entropy on the response (FuseLLM)")
    granularity: Literal["sequence", "token"] = Field(
        "sequence", description="choose once a sample (FuseLLM's code) or at every token"
    )


class UdfTarget(FusionOptions):
    target: Literal["udf"] = Field(
        description="teachers weighted by 1 / (entropy + cross-entropy) at every token (eq. 5)"
    )
    epsilon: float = Field(1e-6, gt=0, description="added to entropy + cross-entropy, in nats")


class MinilogitTarget(FusionOptions):
    target: Literal["minilogit"] = Field(
        description="element-wise minimum of the teachers' logits relative to the gold token (KDCL)"
    )


Fusion = Annotated[KdTarget | NaiveTarget | MinceTarget | UdfTarget | MinilogitTarget, Field(discriminator="target")]
