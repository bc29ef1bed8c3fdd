"""A list of messages with role and content."""

import random

from llmfusion.data.layout import Columns, Row, sample_layout
from llmfusion.data.turns import chat


@sample_layout(reads='`messages`: a list of `{"role", "content"}`', example="no_robots")
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    return chat([(message["role"], message["content"]) for message in row["messages"]])
