"""How checkpoints are merged: the options of one of the methods in :mod:`llmfusion.merging.methods`."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from llmfusion.study.merge_methods import load_method, method_names
from llmfusion.study.schema.options import MergeOptions

if TYPE_CHECKING:
    Merge = MergeOptions
else:
    Merge = Annotated[
        Union[tuple(load_method(name).Options for name in method_names())],  # noqa: UP007
        Field(discriminator="method"),
    ]
