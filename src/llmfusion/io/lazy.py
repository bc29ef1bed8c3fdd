"""Modules that are imported when they are first used.

A plug-in holds its options and its computation in one file. A study is checked from the options alone, in half a
second; torch and numba take several. ``from llmfusion.io.lazy import torch`` gives a plug-in the module without
importing it yet.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """Imports the module of this name when an attribute is first asked for, and keeps the attribute."""

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self.__name__), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")

__all__ = ["LazyModule", "np", "torch"]
