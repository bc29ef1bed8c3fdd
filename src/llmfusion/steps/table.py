"""Gather the cells of one table into CSV and Markdown."""

import csv
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.errors import DamagedError, UserError
from llmfusion.reporting.stats import error_of_mean, mean, per_cent, standard_error
from llmfusion.study.kinds.table import Spec

MINIATURE = (
    "Miniature models on generated tasks: these numbers check the pipeline and are not comparable with any paper's."
)


def build(job: Job) -> None:
    """Write ``NAME.csv`` and ``NAME.md``; refuse cells that were made by another study than the one that asks."""
    spec = job.parse(Spec)
    name = job.folder.name.removeprefix(".").split(".csv.")[0]
    rows = [TableRow(job, spec, row) for row in spec.rows]
    reference = next((row for row in rows if spec.reference in row.models), None)
    written = [row.fields() | (row.compared(reference) if reference else {}) for row in rows]
    with open(job.folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(written[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(written)
    (job.folder / f"{name}.md").write_text(_markdown(spec, written, reference))
    job.facts.update(rows=len(rows), scale=spec.scale)


class TableRow:
    """A row's cells: one model, or replicates of one method, whose mean and standard error are told."""

    def __init__(self, job: Job, spec: Spec, row: list[Any]):
        self.models, self.category, self.label, self.method, self.sources = row
        self.scale = spec.scale
        self.cells = {task: [_cell(job, spec, model, task) for model in self.models] for task, _ in spec.tasks}
        self.averages = [mean([cells[r]["score"] for cells in self.cells.values()]) for r in range(len(self.models))]

    def fields(self) -> dict[str, Any]:
        """The row as it is written, without comparisons."""
        out: dict[str, Any] = {
            "category": self.category,
            "label": self.label,
            "method": self.method,
            "models": self.sources,
        }
        out |= {"model": " ".join(self.models), "scale": self.scale}
        for task, cells in self.cells.items():
            scores, errors = [c["score"] for c in cells], [c["stderr"] for c in cells]
            k, n = sum(c["k"] for c in cells), sum(c["n"] for c in cells)
            out |= {
                task: f"{mean(scores):.2f}",
                f"{task}_stderr": f"{standard_error(scores, errors):.2f}",
                f"{task}_k": k,
                f"{task}_n": n,
            }
        of_mean = error_of_mean([cells[0]["stderr"] for cells in self.cells.values()])
        return {
            **out,
            "average": f"{mean(self.averages):.2f}",
            "average_stderr": f"{standard_error(self.averages, [of_mean]):.2f}",
        }

    def compared(self, other: "TableRow") -> dict[str, str]:
        """Change of the average against another row: relative, as the paper states gains; with replicates also paired, in points."""
        base, mine = mean(other.averages), mean(self.averages)
        out = {"gain_percent": f"{100 * (mine / base - 1):+.2f}" if base else ""}
        if len(self.models) > 1:
            pairs = [a - b for a, b in zip(self.averages, other.averages, strict=True)]
            out |= {"difference": f"{mean(pairs):+.2f}", "difference_stderr": f"{standard_error(pairs, []):.2f}"}
        return out


def _cell(job: Job, spec: Spec, model: str, task: str) -> dict[str, Any]:
    score = job.input(f"scores/{model}/{task}")
    expected = spec.cells[model][task]
    if not score.manifest["fingerprint"].startswith(expected):
        raise UserError(
            f"results/scores/{model}/{task}.json was made by another study or an earlier version of this one (fingerprint "
            f"{score.manifest['fingerprint'][:16]}, this study asks for {expected}); a table never mixes them. Make it again with: "
            f"snakemake results/scores/{model}/{task}.json"
        )
    facts = score.facts
    found = {key: facts[key] for key in ("k", "n", "score", "stderr")}
    if (wrong := _wrong(**found)) is not None:
        raise DamagedError(
            f"results/scores/{model}/{task}.json: {wrong}, found {found}; make it again with: snakemake results/scores/{model}/{task}.json -f"
        )
    return facts


def _wrong(k: Any, n: Any, score: Any, stderr: Any) -> str | None:
    """What keeps four facts from being a score, or None."""
    if not (type(k) is type(n) is int and 0 <= k <= n and n > 0):
        return "expected k right of n items"
    expected, error = per_cent(k, n)
    return None if (score, stderr) == (expected, error) else f"expected the score {expected} and its error {error}"


def _markdown(spec: Spec, rows: list[dict[str, Any]], reference: TableRow | None) -> str:
    names = [*(task for task, _ in spec.tasks), "average"]
    head = ["", *(label for _, label in spec.tasks), "average"]
    versus = {"difference": "points", "gain_percent": "%"} if reference else {}
    versus = {key: unit for key, unit in versus.items() if key in rows[0]}
    head += [f"vs {reference.label} ({unit})" for unit in versus.values() if reference]
    lines = [f"# {spec.title}", "", *([f"**{MINIATURE}**", ""] if spec.scale == "miniature" else [])]
    category = None
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        if row["category"] != category:
            category = row["category"]
            lines.append(f"| **{category}** |" + " |" * (len(head) - 1))
        cells = [f"{row[c]} ±{row[f'{c}_stderr']}" for c in names]
        cells += [f"{row[key]} ±{row['difference_stderr']}" if key == "difference" else row[key] for key in versus]
        lines.append("| " + " | ".join([row["label"], *cells]) + " |")
    replicates = len(spec.rows[0][0])
    items = ", ".join(f"{label} n={rows[0][f'{task}_n'] // replicates}" for task, label in spec.tasks)
    told = (
        f"one standard error over {replicates} replicates"
        if replicates > 1
        else "one standard error of sampling the items"
    )
    return "\n".join([*lines, "", f"Per cent right ± {told} ({items}).", ""])
