"""Types of options that several merge methods have, with bounds and descriptions; each method gives its own default."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from llmfusion.io.lazy import np
from llmfusion.merging.blocks import Array

Weight = Annotated[
    list[float] | float | None,
    Field(description="weight of each model: one value for all, or one each. Default: 1/J for ta, 1 for ties"),
]
SelectScope = Annotated[
    Literal["coefficients", "values"],
    Field(
        description="selection shapes only the coefficients (FuseChat's code), or also the merged values (the papers)"
    ),
]
Normalize = Annotated[
    Literal["disjoint", "none"], Field(description="divide by the coefficients that agree in sign, or not")
]
Tau = Annotated[
    float,
    Field(gt=0, le=1, description="share of the positions that are selected (rsaf: before the skewness changes it)"),
]
Eps = Annotated[float, Field(gt=0, description="added to the pivot's absolute value in the rate of change")]
Rate = Annotated[
    Literal["relative", "log"],
    Field(description="whose skewness sets the share: |delta|/(|pivot| + eps), or its logarithm"),
]
SelectBy = Annotated[Literal["rate", "delta"], Field(description="select by |delta|/(|pivot| + eps), or by |delta|")]


def weights_of(weight: Sequence[float] | float | None, models: int, default: float) -> Array:
    """``weight`` as one float32 value a model, ``(J,)``; ``default`` where none is given."""
    values = np.asarray(default if weight is None else weight, np.float32)  # () or (J,)
    return np.array(np.broadcast_to(values, (models,)))
