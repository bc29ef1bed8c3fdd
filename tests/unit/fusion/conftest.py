"""Targets that a test adds to those of the project."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from llmfusion.study.fusion_targets import PACKAGE, load_target
from llmfusion.study.plugins import load_plugin, plugin_names
from tests.unit.fusion.stand_ins import GATE


@pytest.fixture
def add_target(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Writes the file of a target, with its name and its text, where only this test finds it."""
    package = import_module(PACKAGE)

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        plugin_names.cache_clear()

    package.__path__.append(str(tmp_path))
    yield add
    package.__path__.remove(str(tmp_path))
    for cached in (load_target, load_plugin, plugin_names):
        cached.cache_clear()
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"{PACKAGE}.{path.stem}", None)
        if hasattr(package, path.stem):
            delattr(package, path.stem)


@pytest.fixture
def gate(add_target: Callable[[str, str], None]) -> Any:
    """Options of a target with learned parameters."""
    add_target("gate", GATE)
    return load_target("gate").Options
