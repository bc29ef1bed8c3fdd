"""How the columns of a dataset become samples or test items: what each file of :mod:`llmfusion.data.layouts` declares.

A layout is one function ``convert`` with one of the decorators of this module; its file's name is its name in a study.
It looks columns up with ``row["name"]``: a column that is not there stops the step with the list of those that are.
``None``, or an error inside a row (a key or a type that is not as expected), means: nothing usable in this row, counted
as ``malformed``.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from llmfusion.study import data_plugins
from llmfusion.study.plugins import call_mismatch

Row = dict[str, Any]
Columns = dict[str, str]  # "prompt" and "response": the columns that a study names; empty for layouts that need none
SampleFunction = Callable[[Row, Columns, random.Random], Row | None]
ItemFunction = Callable[[Row], Row | None]


@dataclass(frozen=True)
class SampleLayout:
    """Calling it converts a row to ``{"messages": [...]}`` or ``{"text": ...}``, or to None."""

    convert: SampleFunction
    reads: str  # Markdown, for the table of layouts: which columns, and what they hold
    example: str  # a dataset with this layout
    needs_columns: bool = False  # the study must name the columns of prompt and response
    makes: ClassVar[str] = "sample"

    def __call__(self, row: Row, columns: Columns, rng: random.Random) -> Row | None:
        """``rng`` is for layouts that draw one of several samples of a row."""
        return self.convert(row, columns, rng)

    def problems(self) -> list[str]:
        """What the declaration lacks."""
        empty = [key for key in ("reads", "example") if not getattr(self, key)]
        return [f"@sample_layout needs {key}" for key in empty] + _signature(self.convert, "row", "columns", "rng")


@dataclass(frozen=True)
class ItemLayout:
    """Calling it converts a row to the fields of a test item, or to None."""

    convert: ItemFunction
    reads: str  # Markdown, for the table of layouts: which columns, and what they hold
    fields: tuple[str, ...]  # of the items it makes: what a task's prompt can use
    needs_columns: ClassVar[bool] = False
    makes: ClassVar[str] = "item"

    def __call__(self, row: Row) -> Row | None:
        """The row as an item, or None where nothing in it can be used."""
        return self.convert(row)

    def problems(self) -> list[str]:
        """What the declaration lacks."""
        empty = [key for key in ("reads", "fields") if not getattr(self, key)]
        return [f"@item_layout needs {key}" for key in empty] + _signature(self.convert, "row")


def sample_layout(
    *, reads: str = "", example: str = "", needs_columns: bool = False
) -> Callable[[SampleFunction], SampleLayout]:
    """Decorator of ``convert(row, columns, rng)``: rows become training samples. See :class:`SampleLayout`."""
    return lambda convert: SampleLayout(convert, reads, example, needs_columns)


def item_layout(*, reads: str = "", fields: tuple[str, ...] = ()) -> Callable[[ItemFunction], ItemLayout]:
    """Decorator of ``convert(row)``: rows become test items. See :class:`ItemLayout`."""
    return lambda convert: ItemLayout(convert, reads, fields)


def sample_layouts() -> dict[str, SampleLayout]:
    """All sample layouts by name. Raises :class:`PluginError` for a file that is not complete."""
    return data_plugins.layouts("sample")


def item_layouts() -> dict[str, ItemLayout]:
    """All item layouts by name. Raises :class:`PluginError` for a file that is not complete."""
    return data_plugins.layouts("item")


def _signature(function: Callable[..., Any], *parameters: str) -> list[str]:
    """A problem where the function cannot be called with these: later it would look like malformed rows."""
    return [f"convert must take ({', '.join(parameters)})"] if call_mismatch(function, *parameters) else []
