"""Functions to complete, with their test programs."""

from llmfusion.data.layout import Row, item_layout

FIELDS = ("task_id", "prompt", "entry_point", "test")


@item_layout(reads="`task_id`, `prompt`, `entry_point`, `test`", fields=FIELDS)
def convert(row: Row) -> Row | None:
    return {field: row[field] for field in FIELDS}
