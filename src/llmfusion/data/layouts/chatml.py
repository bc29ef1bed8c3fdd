"""One string with all turns, between ChatML's marks."""

import random
import re

from llmfusion.data.layout import Columns, Row, sample_layout
from llmfusion.data.turns import chat

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


@sample_layout(reads=r"`text`: one string of `<\|im_start\|>role` ... `<\|im_end\|>` turns", example="oasst_top1")
def convert(row: Row, columns: Columns, rng: random.Random) -> Row | None:
    return chat(TURN.findall(row["text"]))
