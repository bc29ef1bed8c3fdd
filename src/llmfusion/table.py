"""Step ``table``: gather the cells of one table into CSV and Markdown."""

import csv
import sys
from typing import Any

from llmfusion.errors import DamagedError, UserError
from llmfusion.step import Job, run
from llmfusion.tables.stats import mean, per_cent

MINIATURE = "Miniature models on generated tasks: these numbers check the pipeline and are not comparable with any paper's."


def build(job: Job) -> None:
    """Write ``NAME.csv`` and ``NAME.md``; refuse cells that were made by another study than the one that asks."""
    spec = job.spec
    name = job.folder.name.removeprefix(".").split(".csv.")[0]
    rows = [_row(job, row) for row in spec["rows"]]
    if "reference" in spec:
        _compare(rows, spec["reference"])
    with open(job.folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (job.folder / f"{name}.md").write_text(_markdown(spec, rows))
    job.facts.update(rows=len(rows), scale=spec["scale"])


def _row(job: Job, row: list[str]) -> dict[str, Any]:
    model, category, label, method, sources = row
    cells = {task: _cell(job, model, task) for task, _ in job.spec["tasks"]}
    out: dict[str, Any] = {"category": category, "label": label, "method": method, "models": sources, "model": model, "scale": job.spec["scale"]}
    for task, facts in cells.items():
        out |= {task: f"{facts['score']:.2f}", f"{task}_stderr": f"{facts['stderr']:.2f}", f"{task}_k": facts["k"], f"{task}_n": facts["n"]}
    average, error = mean([f["score"] for f in cells.values()], [f["stderr"] for f in cells.values()])
    return {**out, "average": f"{average:.2f}", "average_stderr": f"{error:.2f}"}


def _compare(rows: list[dict[str, Any]], reference: str) -> None:
    """Add the relative change of each average against the reference row's, in per cent (how the paper states its gains)."""
    base = next(float(row["average"]) for row in rows if row["model"] == reference)
    for row in rows:
        row["gain_percent"] = f"{100 * (float(row['average']) / base - 1):+.2f}" if base else ""


def _cell(job: Job, model: str, task: str) -> dict[str, Any]:
    score = job.input(f"scores/{model}/{task}")
    expected = job.spec["cells"][model][task]
    if not score.manifest["fingerprint"].startswith(expected):
        raise UserError(
            f"results/scores/{model}/{task}.json was made by another study or an earlier version of this one (fingerprint "
            f"{score.manifest['fingerprint'][:16]}, this study asks for {expected}); a table never mixes them. Make it again with: "
            f"snakemake results/scores/{model}/{task}.json"
        )
    facts = score.facts
    found = {key: facts[key] for key in ("k", "n", "score", "stderr")}
    if (wrong := _wrong(**found)) is not None:
        raise DamagedError(f"results/scores/{model}/{task}.json: {wrong}, found {found}; make it again with: snakemake results/scores/{model}/{task}.json -f")
    return facts


def _wrong(k: Any, n: Any, score: Any, stderr: Any) -> str | None:
    """What keeps four facts from being a score, or None."""
    if not (type(k) is type(n) is int and 0 <= k <= n and n > 0):
        return "expected k right of n items"
    expected, error = per_cent(k, n)
    return None if (score, stderr) == (expected, error) else f"expected the score {expected} and its error {error}"


def _markdown(spec: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    names = [task for task, _ in spec["tasks"]]
    gains = "gain_percent" in rows[0]
    head = ["", *(label for _, label in spec["tasks"]), "average", *(["vs " + _label(rows, spec["reference"])] if gains else [])]
    lines = [f"# {spec['title']}", "", *([f"**{MINIATURE}**", ""] if spec["scale"] == "miniature" else [])]
    category = None
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        if row["category"] != category:
            category = row["category"]
            lines.append(f"| **{category}** |" + " |" * (len(head) - 1))
        cells = [f"{row[c]} ±{row[f'{c}_stderr']}" for c in [*names, "average"]]
        lines.append("| " + " | ".join([row["label"], *cells, *([f"{row['gain_percent']} %"] if gains else [])]) + " |")
    items = ", ".join(f"{label} n={rows[0][f'{task}_n']}" for task, label in spec["tasks"])
    return "\n".join([*lines, "", f"Per cent right ± one standard error of sampling the items ({items}).", ""])


def _label(rows: list[dict[str, Any]], model: str) -> str:
    return next(row["label"] for row in rows if row["model"] == model)


if __name__ == "__main__":
    sys.exit(run("table", build))
