"""Plug-in files written by a test, in a package of their own."""

import itertools
from pathlib import Path

import pytest

_NUMBERS = itertools.count()  # a new name each time: modules are loaded once a process


def write_plugins(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> str:
    """Write modules, by name, into a new package that can be imported. Returns the package's name."""
    name = f"written_plugins_{next(_NUMBERS)}"
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text('"""Plug-ins of a test."""\n')
    for module, source in sources.items():
        (package / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    return name
