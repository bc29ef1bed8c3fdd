"""A list of turns from human and gpt, as ShareGPT has them."""

import random

from llmfusion.data.layout import Columns, Row, sample_layout
from llmfusion.data.turns import chat


@sample_layout(
    reads='`conversations`: a list of `{"from", "value"}`, from `human`, `gpt` or `system`', example="ShareGPT"
)
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    return chat([(turn["from"], turn["value"]) for turn in row["conversations"]])
