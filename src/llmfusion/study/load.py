"""Load a study: read, check, and work out every artifact's inputs and spec. Imports no torch."""

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from llmfusion import ROOT
from llmfusion.study import references, strict_yaml
from llmfusion.study.errors import Key, Problem, StudyError, from_pydantic, report
from llmfusion.study.schema.study import Study


def read_study(file: str | Path) -> Study:
    """Read and check one study file. Raises :class:`StudyError` with every mistake in it."""
    name = short_path(Path(file))
    try:
        raw, lines = strict_yaml.load(file)
    except OSError as error:
        raise StudyError(f"{name}: cannot be read: {error.strerror}") from None
    except strict_yaml.YamlError as error:
        raise StudyError(_syntax_report(name, error)) from None
    if not isinstance(raw, dict):
        kind = type(raw).__name__
        raise StudyError(f"{name}: a study is a mapping of keys (title, models, tables, ...); this is {kind}")
    raw = {key: value for key, value in raw.items() if not str(key).startswith("x-")}  # holders of YAML anchors
    study, problems = _parse(raw)
    problems += references.problems(references.Declared(raw, _valid_entries(raw, study)))
    if problems or study is None:
        raise StudyError(report(name, problems, lines))
    return study


def refusal(file: str | Path, problems: list[Problem]) -> StudyError:
    """The error for mistakes that were found after the study was read: as all others, with file and line."""
    lines: dict[Key, int] = {}
    with contextlib.suppress(OSError, strict_yaml.YamlError):  # changed or gone since
        lines = strict_yaml.load(file)[1]
    return StudyError(report(short_path(Path(file)), problems, lines))


def short_path(file: Path) -> str:
    """A path for messages: relative to the working directory or the clone if it lies in one of them."""
    whole = Path(os.path.realpath(file))  # unlike Path.resolve() also of a link to itself
    for base in (Path.cwd(), ROOT):
        if whole.is_relative_to(base):
            return str(whole.relative_to(base))
    return str(file)


def _syntax_report(name: str, error: strict_yaml.YamlError) -> str:
    rows = [f"  {name}:{line}: {text}" for line, text in error.problems]
    return "\n".join([f"{name}: {len(rows)} mistake{'s' * (len(rows) != 1)}; nothing was started", *rows])


def _parse(raw: dict[str, Any]) -> tuple[Study | None, list[Problem]]:
    try:
        return Study.model_validate(raw), []
    except ValidationError as error:
        return None, from_pydantic(error, raw, _schema())


@cache
def _schema() -> dict[str, Any]:
    return Study.model_json_schema()


def _valid_entries(raw: dict[str, Any], study: Study | None) -> dict[Key, Any]:
    """Entries that are valid on their own, so that references are checked even where others are faulty."""
    out: dict[Key, Any] = {}
    for section, entry_type in _entry_types(Study).items():
        entries: Any = raw if study is None else study
        for part in section:
            entries = entries.get(part) if isinstance(entries, dict) else getattr(entries, part, None)
        for name, entry in entries.items() if isinstance(entries, dict) else []:
            valid = entry if study is not None else _validated(entry_type, entry)
            if valid is not None:
                out[(*section, str(name))] = valid
    return out


def _entry_types(model: type[BaseModel], section: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Type of the entries of each section that holds named entries, e.g. ``("models", "trained")``."""
    out: dict[tuple[str, ...], Any] = {}
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is dict:
            out[(*section, name)] = get_args(field.annotation)[1]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out |= _entry_types(field.annotation, (*section, name))
    return out


def _validated(entry_type: Any, entry: Any) -> Any:
    """The entry as its model, or None if it is not valid."""
    try:
        return TypeAdapter(entry_type).validate_python(entry)
    except ValidationError:
        return None
