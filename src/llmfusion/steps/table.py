"""Collect the cells of one table into CSV and Markdown."""

from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.errors import DamagedError, UserError
from llmfusion.reporting.stats import per_cent
from llmfusion.reporting.tables import Score, TableRow, csv_of, markdown_of, results_frame
from llmfusion.study.kinds.table import Spec


def build(job: Job) -> None:
    """Write ``NAME.csv`` and ``NAME.md``; refuse cells that were made by another study than the one that asks."""
    spec = job.parse(Spec)
    name = job.folder.name.removeprefix(".").split(".csv.")[0]
    rows = [_row(job, spec, *fields) for fields in spec.rows]
    reference = next((row for row in rows if spec.reference in row.models), None)
    frame = results_frame(rows, spec.scale, reference)
    (job.folder / f"{name}.csv").write_text(csv_of(frame), encoding="utf-8", newline="")
    label = reference.label if reference else None
    page = markdown_of(frame, spec.title, dict(spec.tasks), len(rows[0].models), label)
    (job.folder / f"{name}.md").write_text(page, encoding="utf-8")
    job.facts.update(rows=len(rows), scale=spec.scale)


def _row(job: Job, spec: Spec, models: list[str], category: str, label: str, method: str, sources: str) -> TableRow:
    scores = {task: [_score(job, spec, model, task) for model in models] for task, _ in spec.tasks}
    return TableRow(models, category, label, method, sources, scores)


def _score(job: Job, spec: Spec, model: str, task: str) -> Score:
    artifact = job.input(f"scores/{model}/{task}")
    file = f"results/scores/{model}/{task}.json"
    expected = spec.cells[model][task]
    if not artifact.manifest["fingerprint"].startswith(expected):
        fingerprints = f"fingerprint {artifact.manifest['fingerprint'][:16]}, this study asks for {expected}"
        raise UserError(
            f"{file} was made by another study or an earlier version of this one ({fingerprints}); "
            f"a table never mixes them. Make it again with: snakemake {file}"
        )
    facts = artifact.facts
    values = {key: facts[key] for key in ("k", "n", "score", "stderr")}
    if (mistake := _mistake(**values)) is not None:
        raise DamagedError(f"{file}: {mistake}, found {values}; make it again with: snakemake {file} -f")
    return Score(values["k"], values["n"], values["score"], values["stderr"])


def _mistake(k: Any, n: Any, score: Any, stderr: Any) -> str | None:
    """What keeps four facts from being a score, or None."""
    if not (type(k) is type(n) is int and 0 <= k <= n and n > 0):
        return "expected k right of n items"
    expected, error = per_cent(k, n)
    return None if (score, stderr) == (expected, error) else f"expected the score {expected} and its error {error}"
