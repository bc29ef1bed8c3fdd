"""Word problems; the number after ``####`` is the answer, what stands before it the worked solution."""

from llmfusion.data.layout import Row, item_layout


@item_layout(reads="`question`, `answer` (worked solution, `####`, number)", fields=("question", "answer", "solution"))
def convert(row: Row) -> Row | None:
    solution, _, answer = row["answer"].rpartition("####")
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}
