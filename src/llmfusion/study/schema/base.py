"""What all sections of a study share: strict models, names, addresses."""

import re
import unicodedata
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from llmfusion.io.templates import Style

RESERVED = "results"  # the folder that addresses are relative to (llmfusion.study.addresses.results_index)
LONGEST_PATH = 1000  # bytes; what is made lies below, and Linux has 4096 for all of it
LONGEST_FILE_NAME = 255
REPOSITORY = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$"


def _not_reserved(name: str) -> str:
    if name == RESERVED:
        raise ValueError(f"{RESERVED!r} is the name of the folder of all results; take another")
    return name


def _path(text: str) -> str:
    """A path that a file system can hold and that means the same to every program."""
    if any(not character.isprintable() for character in text):
        raise ValueError(f"got {text[:60]!r}: a path has no line breaks, tabs or other control characters")
    if re.search(r"[{}]", text):
        raise ValueError(f"got {text[:60]!r}: braces are wildcards to Snakemake; rename the file or the folder")
    if text.startswith("~"):
        raise ValueError(f"got {text[:60]!r}: ~ is not expanded; write the whole path")
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_FILE_NAME for part in text.split("/")):
        limits = f"{LONGEST_PATH} bytes, and {LONGEST_FILE_NAME} between two slashes"
        raise ValueError(f"got {len(text.encode())} bytes, {text[:40]!r}...: a path has at most {limits}")
    return text


def _shown(text: str) -> str:
    """A text that is shown as it is: on terminals, which obey control characters, and in tables."""
    if any(unicodedata.category(character) == "Cc" and character not in "\n\t" for character in text):
        raise ValueError(f"got {text[:60]!r}: it is shown as it is, and has no control characters")
    return text


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80), AfterValidator(_not_reserved)]
Address = Annotated[str, Field(pattern=r"^(base|trained|merged)/[a-z0-9][a-z0-9._-]*$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Shown = Annotated[str, AfterValidator(_shown)]
FilePath = Annotated[str, Field(min_length=1), AfterValidator(_path)]


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def dump(section: BaseModel, *leave_out: str) -> dict[str, Any]:
    """A section as plain data, without defaults and the fields to ``leave_out``."""
    return section.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(leave_out))


def started_from(entry: Any) -> str | None:
    """Address of the model that a model of a study was trained from, or merged over; None where there is none."""
    return getattr(entry, "init", None) or getattr(entry, "pivot", None)


class Licensed(Section):
    """An input from outside, whose licence the study states."""

    license: Shown = Field(
        min_length=1, description="licence of this input as its owner states it; every model made from it inherits it"
    )


def template_fields(text: str, style: "Style", **example: Any) -> frozenset[str]:
    """Names that a Jinja template reads.

    Raises ValueError, in the user's words, if it cannot be compiled, or does what no template must do when it is
    rendered with ``example``. Where it fails with an example otherwise, it may still be right for what it is meant for.
    """
    from llmfusion.io.templates import TemplateError, UnsafeTemplate, compiled

    try:
        template = compiled(text, "line", style)
        template.render(**example)
    except UnsafeTemplate as error:
        raise ValueError(f"is no safe Jinja template: {_at_line(error)}") from None
    except TemplateError as error:
        if error.summary:
            return template.fields
        raise ValueError(f"is no Jinja template: {_at_line(error)}") from None
    return template.fields


def _at_line(error: Exception) -> str:
    """The message without the template's name, which the place in the study says."""
    return str(error).removeprefix("line, ").removeprefix("line: ")
