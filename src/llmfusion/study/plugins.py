"""Plug-ins: every module of a package is one, named by its file. Adding a file adds a target, a method, a layout, a format, a kind."""

import ast
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


class PluginError(Exception):
    """A plug-in's file lacks what its room asks for. ``str()`` names the file and what is missing."""


@cache
def plugin_names(package: str) -> tuple[str, ...]:
    """Names of a package's plug-ins, sorted, without importing them. Names that begin with ``_`` are not plug-ins."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = {path.stem for place in spec.submodule_search_locations for path in Path(place).glob("[a-z]*.py")}
    return tuple(sorted(found))


@cache
def load_plugin(package: str, name: str, *required: str) -> ModuleType:
    """One plug-in's module. Raises :class:`PluginError` where it does not define the ``required`` names, or has no docstring."""
    module = import_module(f"{package}.{name}")
    missing = [attribute for attribute in required if not hasattr(module, attribute)]
    missing += (
        []
        if (module.__doc__ or "").strip()
        else ["a docstring (its first line is the sentence of tables and model cards)"]
    )
    if missing:
        raise PluginError(
            f"{module.__file__}: a plug-in of {package} needs: {', '.join(required)}; missing: {', '.join(missing)}"
        )
    return module


def load_plugins(package: str, *required: str) -> dict[str, ModuleType]:
    """All plug-ins of a package by name."""
    return {name: load_plugin(package, name, *required) for name in plugin_names(package)}


def summary_of(package: str, name: str) -> str:
    """First line of a plug-in's docstring, without its full stop; read from the file, so that nothing heavy is imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    text = (Path(spec.submodule_search_locations[0]) / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].rstrip(".")
