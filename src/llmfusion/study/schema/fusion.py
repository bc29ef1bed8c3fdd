"""How teachers are fused: the options of one of the targets in :mod:`llmfusion.fusion.targets`."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from llmfusion.study.fusion_targets import load_target, target_names
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    Fusion = FusionOptions
else:
    Fusion = Annotated[
        Union[tuple(load_target(name).Options for name in target_names())],  # noqa: UP007
        Field(discriminator="target"),
    ]
