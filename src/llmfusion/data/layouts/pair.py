"""Two columns: what the user says and what the model should answer."""

import random

from llmfusion.data.layout import Columns, Row, sample_layout
from llmfusion.data.turns import chat


@sample_layout(
    reads="the two columns named under `columns: {prompt: ..., response: ...}`",
    example="MetaMathQA and many others",
    needs_columns=True,
)
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    return chat([("user", row[columns["prompt"]]), ("assistant", row[columns["response"]])])
