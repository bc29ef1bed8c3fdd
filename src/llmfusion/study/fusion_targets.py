"""The fusion targets there are: the files of :mod:`llmfusion.fusion.targets`, each checked as it is loaded.

A broken one is refused when a study is checked, so that it never gets as far as a training. Nothing here imports torch.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from llmfusion.study.plugins import PluginError, call_mismatch, load_plugin, plugin_names
from llmfusion.study.schema.options import FusionOptions

if TYPE_CHECKING:
    from llmfusion.fusion.target import FusionTarget

PACKAGE = "llmfusion.fusion.targets"
BASE = "llmfusion.fusion.target"


@cache
def load_target(name: str) -> ModuleType:
    """The file of a target: its ``Options`` and its ``Target``. Raises :class:`PluginError` for what it lacks."""
    module = load_plugin(PACKAGE, name, "Options", "Target")
    if faults := list(_faults(name, module)):
        raise PluginError(f"{module.__file__}: the fusion target {name} needs: {'; '.join(faults)}")
    return module


def target_class(name: str) -> "type[FusionTarget]":
    """The class of a target, whose attributes say what it can take; does not import torch."""
    cls: type[FusionTarget] = load_target(name).Target
    return cls


def target_names() -> tuple[str, ...]:
    """Names of all targets, sorted."""
    return plugin_names(PACKAGE)


def _faults(name: str, module: ModuleType) -> Iterator[str]:
    """What a target's file lacks."""
    options: Any = module.Options
    if not (inspect.isclass(options) and issubclass(options, FusionOptions)):
        yield "class Options(FusionOptions)"
    elif get_args(options.model_fields["target"].annotation) != (name,):
        yield f'Options.target: Literal["{name}"], as the file is named'
    base: Any = import_module(BASE).FusionTarget
    if inspect.isclass(module.Target) and issubclass(module.Target, base):
        yield from _class_faults(module.Target, base)
    else:
        yield "class Target(FusionTarget)"


def _class_faults(target: Any, base: Any) -> Iterator[str]:
    if not (isinstance(target.title, str) and target.title.strip()):
        yield "Target.title, which model cards print"
    if target.forward is base.forward and target.combine is base.combine:
        yield "Target.forward(stats) -> (weights, penalty), or Target.combine"
    most = target.max_teachers
    if not (isinstance(target.min_teachers, int) and (most is None or isinstance(most, int))):
        yield "whole numbers for Target.min_teachers and max_teachers"
    elif target.min_teachers < 1 or (most is not None and most < target.min_teachers):
        yield f"1 <= Target.min_teachers <= max_teachers, which are {target.min_teachers} and {most}"
    if call_mismatch(target.__init__, None, None, 2, 8):
        yield "Target.__init__(self, options, teachers, hidden_size)"
