"""How a task is asked and graded: what each file of :mod:`llmfusion.evaluation.tasks` declares as ``FORMAT``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmfusion.study import data_plugins
from llmfusion.study.errors import nearest
from llmfusion.study.plugins import call_mismatch
from llmfusion.study.schema.base import template_fields

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskFormat:
    """One format. Either ``grade`` compares an answer with its item, or ``program`` makes what the sandbox runs.

    All functions get the text of the answer and the item's fields; none may raise, whatever a model has written.
    Grading must not import torch: scores are made again from stored answers where there is no GPU.
    """

    doc_to_text: str = ""  # Jinja text of the question, with the item's fields; a task's own `prompt` replaces it
    doc_to_target: str = ""  # Jinja text of the right answer, for few-shot examples without a worked `solution`
    version: float = 0.0  # stored with the answers; raise it when the question changes
    item_fields: dict[str, type] = field(default_factory=dict)  # what doc_to_text and grade need of an item
    check_item: Callable[[Item], str | None] | None = None  # what keeps an item with these fields from being used
    short_answer: bool = False  # one word answers it: `llmfusion estimate` counts one generated token
    extract: Callable[[str, Item], str | None] | None = None  # (answer, item) -> what counts of the answer
    grade: Callable[[str, Item], bool] | None = None  # (answer, item) -> is it right?
    program: Callable[[str, Item], str] | None = None  # (answer, item) -> what follows the item's `prompt`

    @property
    def runs_programs(self) -> bool:
        """Whether answers are programs, which the sandbox runs against the item's ``test``."""
        return self.program is not None

    def extracted(self, answer: str, item: Item) -> str | None:
        """What counts of an answer: its letter, its number, its program.

        None where nothing is found, or nothing is extracted.
        """
        function = self.program or self.extract
        return None if function is None else function(answer, item)

    def item_problem(self, name: str, item: Item) -> str | None:
        """What keeps an item from being asked and graded in this format, which is called ``name``; or None."""
        for key, expected in self.item_fields.items():
            if not isinstance(item.get(key), expected):
                return f"{key}: a task of format {name!r} needs {expected.__name__}, found {item.get(key)!r:.60}"
        return None if self.check_item is None else self.check_item(item)

    def problems(self) -> list[str]:
        """What the declaration lacks."""
        required = ("doc_to_text", "doc_to_target", "version", "item_fields")
        out = [f"FORMAT needs {key}" for key in required if not getattr(self, key)]
        if (self.grade is None) == (self.program is None):
            out.append("FORMAT needs either grade or program")
        if self.runs_programs:
            missing = {"prompt", "test", "entry_point"} - set(self.item_fields)
            out += [f"FORMAT runs programs and needs the item field {key}" for key in sorted(missing)]
        for key, parameters in (("grade", 2), ("program", 2), ("extract", 2), ("check_item", 1)):
            if (function := getattr(self, key)) is not None:
                names = ("answer", "item")[-parameters:]
                out += [f"{key} must take ({', '.join(names)})"] if call_mismatch(function, *names) else []
        return out + [problem for key in ("doc_to_text", "doc_to_target") for problem in self._template_problems(key)]

    def _template_problems(self, key: str) -> Iterator[str]:
        """Why a text with Jinja in it cannot be parsed, if so: before a job asks it."""
        try:
            template_fields(getattr(self, key), "prompt")
        except ValueError as error:
            yield f"{key} {error}"


def task_formats() -> dict[str, TaskFormat]:
    """All formats by name. Raises :class:`PluginError` for a file that is not complete."""
    return data_plugins.task_formats()


def load_format(name: str) -> TaskFormat:
    """One format. Raises ``ValueError``, in words for the user, where there is none of this name."""
    formats = task_formats()
    if name not in formats:
        raise ValueError(f"there is no task format {name!r}; {nearest(name, formats)}")
    return formats[name]
