"""Tables as a library: data frame, CSV and Markdown from scores."""

import pytest

from llmfusion.reporting.stats import per_cent
from llmfusion.reporting.tables import Score, TableRow, csv_of, markdown_of, results_frame


def row(name: str, *correct: int, category: str = "C", label: str | None = None) -> TableRow:
    scores = [Score(k, 4, *per_cent(k, 4)) for k in correct]
    models = [f"trained/{name}-{i}" for i in range(len(correct))]
    return TableRow(models, category, label or name, "sft", "p", {"a": scores})


def test_a_frame_has_a_line_a_row_and_counts_are_numbers() -> None:
    frame = results_frame([row("x", 1), row("y", 4)], "paper")
    assert list(frame["a"]) == ["25.00", "100.00"]
    assert list(frame["a_k"]) == [1, 4]
    assert list(frame["average_stderr"]) == ["21.65", "0.00"]
    assert "gain_percent" not in frame


def test_text_with_commas_and_quotes_is_quoted_and_ends_with_a_line_feed() -> None:
    frame = results_frame([row("x", 1, label='SFT, "twice"')], "paper")
    head, line, end = csv_of(frame).split("\n")
    assert head == "category,label,method,models,model,scale,a,a_stderr,a_k,a_n,average,average_stderr"
    assert line == 'C,"SFT, ""twice""",sft,p,trained/x-0,paper,25.00,21.65,1,4,25.00,21.65'
    assert end == ""


def test_a_reference_of_zero_has_no_gains() -> None:
    reference = row("x", 0)
    frame = results_frame([reference, row("y", 4)], "paper", reference)
    assert list(frame["gain_percent"]) == ["", ""]
    assert csv_of(frame).splitlines()[1].endswith(",0.00,0.00,")
    page = markdown_of(frame, "T", {"a": "A"}, reference="X")
    assert "| y | 100.00 ±0.00 | 100.00 ±0.00 |  |" in page


def test_rows_of_another_number_of_replicates_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        results_frame([row("y", 1, 2, 3)], "paper", row("x", 1, 2))


def test_a_category_is_named_once_as_long_as_it_goes_on() -> None:
    rows = [row("x", 1), row("y", 1), row("z", 1, category="D"), row("w", 1)]
    page = markdown_of(results_frame(rows, "paper"), "T", {"a": "A"})
    lines = [line for line in page.splitlines() if line.startswith("| **")]
    assert lines == ["| **C** | | |", "| **D** | | |", "| **C** | | |"]


def test_a_bar_or_a_line_end_in_a_text_makes_no_cell_and_no_line_of_its_own() -> None:
    rows = [row("x", 1, category="P(a|b)", label="one\ntwo | three")]
    page = markdown_of(results_frame(rows, "paper"), "T\nU", {"a": "A | B"}, reference=None)
    assert "# T U" in page.splitlines()
    assert r"|  | A \| B | average |" in page.splitlines()
    assert r"| **P(a\|b)** | | |" in page.splitlines()
    assert r"| one two \| three | 25.00 ±21.65 | 25.00 ±21.65 |" in page.splitlines()
