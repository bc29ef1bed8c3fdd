"""Options of the merge methods, for studies (`models: merged:`) and for `python -m llmfusion.merge --set`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Address = Annotated[str, Field(pattern=r"^(base|trained|merged)/[a-z0-9][a-z0-9._-]*$")]
_Weight = Annotated[list[float] | float | None, Field(description="weight of each model: one value for all, or one each. Default: 1/J for ta, 1 for ties")]


class _Merge(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    pivot: _Address = Field(description="the model all parents started from")
    parents: list[_Address] = Field(min_length=1, description="models to merge")
    out_dtype: Literal["pivot", "float32", "bfloat16", "float16"] = Field("pivot", description="of the merged weights; pivot: each tensor as in the pivot")
    warn_below: float = Field(0.05, ge=0, le=1, description="warn where a merge keeps less of the deltas' squares, or changes a smaller share of the values")


class TaMerge(_Merge):
    method: Literal["ta"] = Field(description="task arithmetic: pivot + lambda * sum of weighted deltas")
    weight: _Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(False, description="divide by the sum of the weights")


class TiesMerge(_Merge):
    method: Literal["ties"] = Field(description="TIES: trim, elect a sign, average what agrees")
    density: float = Field(0.6, gt=0, le=1, description="share of each delta that is kept, the largest in absolute value")
    weight: _Weight = None
    scale: float = Field(1.0, alias="lambda", description="factor on the merged delta")
    normalize: bool = Field(True, description="divide by the weights that agree")


class _Selecting(_Merge):
    tau: float = Field(0.1, gt=0, le=1, description="share of the positions that are selected (rsaf: before the skewness changes it)")
    select_scope: Literal["coefficients", "values"] = Field(
        "coefficients", description="selection shapes only the coefficients (FuseChat's code), or also the merged values (the papers)"
    )
    normalize: Literal["disjoint", "none"] = Field("disjoint", description="divide by the coefficients that agree in sign, or not")


class SceMerge(_Selecting):
    method: Literal["sce"] = Field(description="SCE: select by variance, calculate coefficients, erase minority signs")


_Eps = Annotated[float, Field(gt=0, description="added to the pivot's absolute value in the rate of change")]
_Rate = Annotated[Literal["relative", "log"], Field(description="whose skewness sets the share: |delta|/(|pivot| + eps), or its logarithm")]
_SelectBy = Annotated[Literal["rate", "delta"], Field(description="select by |delta|/(|pivot| + eps), or by |delta|")]


class RsafMerge(_Selecting):
    method: Literal["rsaf"] = Field(description="RSAF: as SCE, but selecting by the rate of change, a share set by its skewness")
    eps: _Eps = 1e-8
    rate: _Rate = "relative"
    select_by: _SelectBy = "rate"


class RsafLiteralMerge(_Merge):
    method: Literal["rsaf_literal"] = Field(description="RSAF as printed: only the selected values are merged, without a division; nearly the pivot")
    tau: float = Field(0.1, gt=0, le=1, description="share of the positions that are selected, before the skewness changes it")
    eps: _Eps = 1e-8
    rate: _Rate = "relative"
    select_by: _SelectBy = "rate"


Merge = Annotated[TaMerge | TiesMerge | SceMerge | RsafMerge | RsafLiteralMerge, Field(discriminator="method")]
