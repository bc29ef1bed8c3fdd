"""Tables: models against tasks."""

from typing import Annotated

from pydantic import Field

from llmfusion.study.schema.base import Address, Name, Section, Shown


class RowEntry(Section):
    """A row of a table."""

    model: Address | Annotated[list[Address], Field(min_length=2)] = Field(
        description="the model of this row, or its replicates (the same method with other seeds): "
        "the row is then their mean"
    )
    category: Shown = Field(description="block of the table")
    label: Shown = Field(description="what the row is called")

    @property
    def models(self) -> list[str]:
        """The replicates, or the one model."""
        return self.model if isinstance(self.model, list) else [self.model]


class Table(Section):
    """A table: models against tasks."""

    tasks: list[Name] = Field(min_length=1, description="columns, in order")
    reference: Address | None = Field(
        None, description="the row that averages are compared with, in per cent (the paper: SFT)"
    )
    rows: list[RowEntry] = Field(min_length=1, description="rows, in order")
