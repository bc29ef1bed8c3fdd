"""Tables of results: scores of models on tasks as a data frame, as CSV and as Markdown.

A row is one model, or the replicates of one method (other seeds): then each cell is their mean with its standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmfusion.reporting.stats import error_of_mean, mean, standard_error
from llmfusion.study.scales import SCALES


@dataclass(frozen=True)
class Score:
    """A model on a task: ``correct`` of ``items`` in per cent, with the standard error of sampling the items."""

    correct: int
    items: int
    percent: float
    stderr: float


@dataclass(frozen=True)
class TableRow:
    """A row: its models (replicates of one method), how it is described, and its scores."""

    models: list[str]
    category: str
    label: str
    method: str
    sources: str
    scores: dict[str, list[Score]]  # by task, one a model

    @property
    def averages(self) -> list[float]:
        """Each model's mean over the tasks."""
        return [mean([scores[i].percent for scores in self.scores.values()]) for i in range(len(self.models))]


def results_frame(rows: Sequence[TableRow], scale: str, reference: TableRow | None = None) -> pd.DataFrame:
    """One line a row, as ``results/TABLE.csv`` holds it: text with two decimals; ``_k`` and ``_n`` are counts.

    With a ``reference`` row also the change of the average against it: relative, as the paper states gains; with
    replicates also paired, in points. Rows then need equally many replicates.
    """
    lines = [_fields(row, scale) | (_comparison(row, reference) if reference else {}) for row in rows]
    return pd.DataFrame(lines)


def csv_of(frame: pd.DataFrame) -> str:
    """A frame as CSV without an index, lines ended by a line feed."""
    return str(frame.to_csv(index=False, lineterminator="\n"))


def markdown_of(
    frame: pd.DataFrame, title: str, labels: dict[str, str], replicates: int = 1, reference: str | None = None
) -> str:
    """A frame of :func:`results_frame` as a page: the title, the table, and what the numbers are.

    ``labels`` are the columns' labels by task, ``reference`` the label of the row that averages are compared with.
    """
    lines: list[dict[str, Any]] = frame.to_dict("records")
    compared = {key: unit for key, unit in (("difference", "points"), ("gain_percent", "%")) if key in frame}
    head = ["", *labels.values(), "average", *(f"vs {reference} ({unit})" for unit in compared.values())]
    out = [f"# {_line(title)}", ""]
    scale = SCALES[lines[0]["scale"]]
    out += [f"**{scale.label}**", ""] if scale.label else []
    out += [_cells(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    category = None
    for line in lines:
        if line["category"] != category:
            category = line["category"]
            out.append(f"| **{_cell(category)}** |" + " |" * (len(head) - 1))
        means = [f"{line[name]} ±{line[f'{name}_stderr']}" for name in (*labels, "average")]
        out.append(_cells([line["label"], *means, *(_compared_cell(line, key) for key in compared)]))
    items = ", ".join(f"{_line(label)} n={lines[0][f'{task}_n'] // replicates}" for task, label in labels.items())
    kind = f"over {replicates} replicates" if replicates > 1 else "of sampling the items"
    return "\n".join([*out, "", f"Per cent right ± one standard error {kind} ({items}).", ""])


def _fields(row: TableRow, scale: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "category": row.category,
        "label": row.label,
        "method": row.method,
        "models": row.sources,
        "model": " ".join(row.models),
        "scale": scale,
    }
    for task, scores in row.scores.items():
        percents = [score.percent for score in scores]
        out[task] = f"{mean(percents):.2f}"
        out[f"{task}_stderr"] = f"{standard_error(percents, [score.stderr for score in scores]):.2f}"
        out[f"{task}_k"] = sum(score.correct for score in scores)
        out[f"{task}_n"] = sum(score.items for score in scores)
    sampling = error_of_mean([scores[0].stderr for scores in row.scores.values()])
    out["average"] = f"{mean(row.averages):.2f}"
    out["average_stderr"] = f"{standard_error(row.averages, [sampling]):.2f}"
    return out


def _comparison(row: TableRow, reference: TableRow) -> dict[str, str]:
    base = mean(reference.averages)
    out = {"gain_percent": f"{100 * (mean(row.averages) / base - 1):+.2f}" if base else ""}
    if len(row.models) > 1:
        pairs = [own - other for own, other in zip(row.averages, reference.averages, strict=True)]
        out["difference"] = f"{mean(pairs):+.2f}"
        out["difference_stderr"] = f"{standard_error(pairs, []):.2f}"
    return out


def _compared_cell(line: dict[str, Any], key: str) -> str:
    return f"{line[key]} ±{line['difference_stderr']}" if key == "difference" else str(line[key])


def _cells(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, texts)) + " |"


def _cell(text: str) -> str:
    """A text within one cell of a Markdown table."""
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """A text on one line."""
    return " ".join(text.splitlines())
