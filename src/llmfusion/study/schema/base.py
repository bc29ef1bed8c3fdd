"""What all sections of a study share: strict models, names, addresses."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RESERVED = "results"  # the folder that addresses are relative to (llmfusion.study.addresses.results_index)


def _not_reserved(name: str) -> str:
    if name == RESERVED:
        raise ValueError(f"{RESERVED!r} is the name of the folder of all results; take another")
    return name


def _no_wildcard(path: str) -> str:
    if re.search(r"[{}\x00-\x1f\x7f]", path):
        raise ValueError(f"got {path!r}; braces and control characters are wildcards and separators to Snakemake")
    return path


OutsidePath = Annotated[str, Field(min_length=1), AfterValidator(_no_wildcard)]  # of a file of the user's own
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80), AfterValidator(_not_reserved)]
Address = Annotated[str, Field(pattern=r"^(base|trained|merged)/[a-z0-9][a-z0-9._-]*$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


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

    license: str = Field(
        min_length=1, description="licence of this input as its owner states it; every model made from it inherits it"
    )


def template_fields(text: str) -> set[str]:
    """Names a Jinja template reads. Raises ValueError, in the user's words, if it cannot be parsed."""
    import jinja2.meta

    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is no Jinja template: {error.message}") from None
