"""Raw text: every token is a label."""

import random

from llmfusion.data.layout import Columns, Row, sample_layout


@sample_layout(reads="`text`: raw text, every token is a label", example="MiniPile")
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    return {"text": row["text"]} if isinstance(row["text"], str) and row["text"].strip() else None
