"""Plug-ins: every module of a package is one, named by its file.

Adding a file adds a fusion target, a merge method, a data layout, an answer format, or a kind of artifact.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from llmfusion.errors import UserError

DOCSTRING = "a docstring (its first line is the sentence of tables and model cards)"


class PluginError(UserError):
    """A plug-in's file lacks what its room asks for. ``str()`` names the file and what is missing."""


@cache
def plugin_names(package: str) -> tuple[str, ...]:
    """Names of a package's plug-ins, sorted, without importing them. Names that begin with ``_`` are not plug-ins."""
    names = {path.stem for folder in _folders(package) for path in Path(folder).glob("[a-z]*.py")}
    return tuple(sorted(names))


@cache
def load_plugin(package: str, name: str, *required: str) -> ModuleType:
    """One plug-in's module. Raises :class:`PluginError` where a ``required`` name or its docstring is missing."""
    module = import_module(f"{package}.{name}")
    missing = [attribute for attribute in required if not hasattr(module, attribute)]
    if not (module.__doc__ or "").strip():
        missing.append(DOCSTRING)
    if missing:
        needs = f"a plug-in of {package} needs: {', '.join(required)}"
        raise PluginError(f"{module.__file__}: {needs}; missing: {', '.join(missing)}")
    return module


def load_plugins(package: str, *required: str) -> dict[str, ModuleType]:
    """All plug-ins of a package by name."""
    return {name: load_plugin(package, name, *required) for name in plugin_names(package)}


def summary_of(package: str, name: str) -> str:
    """First line of a plug-in's docstring, without its full stop; read from the file, so that nothing is imported."""
    import ast

    paths = [Path(folder) / f"{name}.py" for folder in _folders(package)]
    text = next(path for path in paths if path.exists()).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].rstrip(".")


def call_mismatch(function: Callable[..., Any], *arguments: object, **options: object) -> str | None:
    """Why a plug-in's function cannot be called with these arguments, as its signature says; None where it can."""
    try:
        inspect.signature(function).bind(*arguments, **options)
    except (TypeError, ValueError) as error:  # ValueError: it has no signature
        return str(error)
    return None


def _folders(package: str) -> Sequence[str]:
    """Folders of a package: its own, and those that an extension has added to its ``__path__``."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise PluginError(f"{package}: is not a package")
    return spec.submodule_search_locations
