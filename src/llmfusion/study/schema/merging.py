"""Options of the merge methods, for studies (`models: merged:`) and for `llmfusion merge --set`."""

from typing import Annotated, Literal

from pydantic import Field

from llmfusion.study.schema.options import MergeOptions

_Weight = Annotated[
    list[float] | float | None,
    Field(description="weight of each model: one value for all, or one each. Default: 1/J for ta, 1 for ties"),
]


class TaMerge(MergeOptions):
    method: Literal["ta"] = Field(description="task arithmetic: pivot + lambda * sum of weighted deltas")
    weight: _Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(False, description="divide by the sum of the weights")


class TiesMerge(MergeOptions):
    method: Literal["ties"] = Field(description="TIES: trim, elect a sign, average what agrees")
    density: float = Field(
        0.6, gt=0, le=1, description="share of each delta that is kept, the largest in absolute value"
    )
    weight: _Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(True, description="divide by the weights that agree")


class _Selecting(MergeOptions):
    tau: float = Field(
        0.1, gt=0, le=1, description="share of the positions that are selected (rsaf: before the skewness changes it)"
    )
    select_scope: Literal["coefficients", "values"] = Field(
        "coefficients",
        description="selection shapes only the coefficients (FuseChat's code), or also the merged values (the papers)",
    )
    normalize: Literal["disjoint", "none"] = Field(
        "disjoint", description="divide by the coefficients that agree in sign, or not"
    )


class SceMerge(_Selecting):
    method: Literal["sce"] = Field(description="SCE: select by variance, calculate coefficients, erase minority signs")


_Eps = Annotated[float, Field(gt=0, description="added to the pivot's absolute value in the rate of change")]
_Rate = Annotated[
    Literal["relative", "log"],
    Field(description="whose skewness sets the share: |delta|/(|pivot| + eps), or its logarithm"),
]
_SelectBy = Annotated[Literal["rate", "delta"], Field(description="select by |delta|/(|pivot| + eps), or by |delta|")]


class RsafMerge(_Selecting):
    method: Literal["rsaf"] = Field(
        description="RSAF: as SCE, but selecting by the rate of change, a share set by its skewness"
    )
    eps: _Eps = 1e-8
    rate: _Rate = "relative"
    select_by: _SelectBy = "rate"


class RsafLiteralMerge(MergeOptions):
    method: Literal["rsaf_literal"] = Field(
        description="RSAF as printed: only the selected values are merged, without a division; nearly the pivot"
    )
    tau: float = Field(
        0.1, gt=0, le=1, description="share of the positions that are selected, before the skewness changes it"
    )
    eps: _Eps = 1e-8
    rate: _Rate = "relative"
    select_by: _SelectBy = "rate"


Merge = Annotated[TaMerge | TiesMerge | SceMerge | RsafMerge | RsafLiteralMerge, Field(discriminator="method")]
