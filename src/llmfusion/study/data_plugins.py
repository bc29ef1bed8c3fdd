"""Plug-ins that the data sections of a study name: layouts of rows and formats of tasks.

The rooms declare them (:mod:`llmfusion.data.layout`, :mod:`llmfusion.evaluation.task_format`). A study reads their
names and capabilities here, and a plug-in that is not complete is refused when the first study is checked.
"""

from functools import cache
from typing import Any

from llmfusion.study.plugins import PluginError, load_plugin, plugin_names

LAYOUTS = "llmfusion.data.layouts"
FORMATS = "llmfusion.evaluation.tasks"


@cache
def layouts(makes: str) -> dict[str, Any]:
    """Layouts by name: those that make a ``"sample"``, or an ``"item"``. Raises :class:`PluginError`."""
    decorated = "a function decorated with @sample_layout or @item_layout"
    declared = {name: _declaration(LAYOUTS, name, "convert", decorated) for name in plugin_names(LAYOUTS)}
    return {name: layout for name, layout in declared.items() if layout.makes == makes}


@cache
def task_formats() -> dict[str, Any]:
    """Formats of tasks by name. Raises :class:`PluginError`."""
    return {name: _declaration(FORMATS, name, "FORMAT", "a TaskFormat") for name in plugin_names(FORMATS)}


def format_sentences() -> str:
    """All formats with the first line of their docstrings, for the description of a key."""
    docs = {name: str(load_plugin(FORMATS, name).__doc__).strip() for name in plugin_names(FORMATS)}
    sentences = [f"{name}: {doc.splitlines()[0].rstrip('.')}" for name, doc in docs.items()]
    return "; ".join(sentences).replace("``", "")


def _declaration(package: str, name: str, attribute: str, expected: str) -> Any:
    """What a plug-in's file declares under ``attribute``; its ``problems()`` say what is missing."""
    module = load_plugin(package, name, attribute)
    declaration = getattr(module, attribute)
    problems = declaration.problems() if hasattr(declaration, "problems") else [f"{attribute} must be {expected}"]
    if problems:
        raise PluginError(f"{module.__file__}: {'; '.join(problems)}")
    return declaration
