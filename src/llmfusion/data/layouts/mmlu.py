"""Multiple choice: question, choices, the index of the right one, subject."""

from llmfusion.data.layout import Row, item_layout


@item_layout(
    reads="`question`, `choices` (list), `answer` (index from 0), `subject`",
    fields=("question", "choices", "answer", "subject"),
)
def convert(row: Row) -> Row | None:
    return {
        "question": row["question"].strip(),
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "subject": row["subject"],
    }
