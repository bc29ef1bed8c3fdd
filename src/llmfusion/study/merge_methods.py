"""The merge methods there are: the files of :mod:`llmfusion.merging.methods`, each loaded alone and checked as it is
loaded.

A study that is checked loads all of them; ``llmfusion merge`` loads the one it was asked for.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, get_args

from llmfusion.study.plugins import PluginError, call_mismatch, load_plugin, plugin_names, summary_of
from llmfusion.study.schema.options import MergeOptions

PACKAGE = "llmfusion.merging.methods"


def method_names() -> tuple[str, ...]:
    """Names of all merge methods, sorted. Imports none of them."""
    return plugin_names(PACKAGE)


def method_summary(name: str) -> str:
    """The sentence of a method: the first line of its docstring. Does not import it."""
    return summary_of(PACKAGE, name)


@cache
def load_method(name: str) -> ModuleType:
    """The file of a merge method: its ``Options`` and its ``merge``.

    Raises :class:`PluginError` that says what the file lacks.
    """
    module = load_plugin(PACKAGE, name, "Options", "merge")
    if faults := list(_faults(name, module)):
        raise PluginError(f"{module.__file__}: the merge method {name} needs: {'; '.join(faults)}")
    return module


def _faults(name: str, module: ModuleType) -> Iterator[str]:
    """What a method's file lacks."""
    options: Any = module.Options
    if not (inspect.isclass(options) and issubclass(options, MergeOptions)):
        yield "class Options(MergeOptions)"
    elif get_args(options.model_fields["method"].annotation) != (name,):
        yield f'Options.method: Literal["{name}"], as the file is named'
    if call_mismatch(module.merge, None, None):
        yield "def merge(tensor, options)"
