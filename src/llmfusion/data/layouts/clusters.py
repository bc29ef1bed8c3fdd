"""A cluster of similar samples under one instruction: one of them, at random."""

import random

from llmfusion.data.layout import Columns, Row, sample_layout
from llmfusion.data.turns import chat


@sample_layout(
    reads='`cluster`: `{"samples": [{"input", "output"}, ...]}`, one is drawn; `instruction` becomes the system turn',
    example="orca-best",
)
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    options = row["cluster"]["samples"]
    if not options:
        return None
    chosen = rng.choice(options)
    system = [("system", row["instruction"])] if row["instruction"] else []
    return chat([*system, ("user", chosen["input"]), ("assistant", chosen["output"])])
