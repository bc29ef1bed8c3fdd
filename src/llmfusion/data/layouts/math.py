"""Competition problems; the answer is the last ``\\boxed{}`` of the solution."""

from llmfusion.data.latex import last_boxed
from llmfusion.data.layout import Row, item_layout


@item_layout(
    reads=r"`problem`, `solution` with a `\boxed{}`, `type`", fields=("question", "answer", "solution", "subject")
)
def convert(row: Row) -> Row | None:
    answer = last_boxed(row["solution"])
    if answer is None:
        return None
    return {"question": row["problem"], "answer": answer, "solution": row["solution"], "subject": row["type"]}
