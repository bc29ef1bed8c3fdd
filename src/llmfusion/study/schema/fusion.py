"""How teachers are fused: the options of one of the targets in :mod:`llmfusion.fusion.targets`.

The targets are found here, and a broken one is refused here, so that it never gets as far as a training.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union, get_args

from pydantic import Field

from llmfusion.study.plugins import PluginError, load_plugin, plugin_names
from llmfusion.study.schema.options import FusionOptions

PACKAGE = "llmfusion.fusion.targets"
BASE = "llmfusion.fusion.target"


class TargetCapabilities(Protocol):
    """Class attributes of a target that a study is checked by; ``FusionTarget`` describes them."""

    title: str
    min_teachers: int
    max_teachers: int | None
    topk_refusal: str | None
    accepts_other_vocabularies: bool
    accepts_temperature: bool
    accepts_pivot: bool


@cache
def load_target(name: str) -> ModuleType:
    """The file of a target: its ``Options`` and its ``Target``. Raises :class:`PluginError` for what it lacks."""
    module = load_plugin(PACKAGE, name, "Options", "Target")
    if faults := list(_faults(name, module)):
        raise PluginError(f"{module.__file__}: the fusion target {name} needs: {'; '.join(faults)}")
    return module


def target_capabilities(name: str) -> TargetCapabilities:
    """What a target can take, and its title; does not import torch."""
    capabilities: TargetCapabilities = load_target(name).Target
    return capabilities


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
    try:
        inspect.signature(target.__init__).bind(None, None, 2)
    except TypeError:
        yield "Target.__init__(self, options, teachers)"


if TYPE_CHECKING:
    Fusion = FusionOptions
else:
    Fusion = Annotated[
        Union[tuple(load_target(name).Options for name in target_names())],  # noqa: UP007
        Field(discriminator="target"),
    ]
