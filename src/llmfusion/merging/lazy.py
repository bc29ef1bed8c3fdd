"""The compiled loops, imported when they are first used: merge methods are imported where a study is only checked."""

from typing import TYPE_CHECKING

from llmfusion.io.lazy import LazyModule

if TYPE_CHECKING:
    from llmfusion.merging import kernels, ranking
else:
    kernels = LazyModule("llmfusion.merging.kernels")
    ranking = LazyModule("llmfusion.merging.ranking")

__all__ = ["kernels", "ranking"]
