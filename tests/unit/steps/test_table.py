"""A table from hand-made cells: numbers, order, and the refusal of cells made for another study."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts.job import Job
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import DamagedError, UserError
from llmfusion.steps.table import build
from llmfusion.study.scales import SCALES

CELLS = {
    ("base/p", "a"): (1, 4, 25.0, 21.650635),
    ("base/p", "b"): (3, 4, 75.0, 21.650635),
    ("merged/m", "a"): (4, 4, 100.0, 0.0),
    ("merged/m", "b"): (0, 4, 0.0, 0.0),
}
ROWS = [[["base/p"], "Pivot", "The pivot", "none", "p"], [["merged/m"], "Fused", "A merge", "pairwise-ta", "code+math"]]


def job(folder: Path, scale: str = "miniature", reference: str | None = None, **changed: str) -> Job:
    draft = folder / ".table2.csv.token.draft"
    draft.mkdir()
    prints = {f"scores/{m}/{t}": f"{i}" * 64 for i, (m, t) in enumerate(CELLS)}
    fingerprints: dict[str, Any] = {
        m: {t: prints[f"scores/{m}/{t}"][:16] for t in "ab"} for m in ("base/p", "merged/m")
    }
    inputs = {}
    for (model, task), (k, n, score, error) in CELLS.items():
        address = f"scores/{model}/{task}"
        facts = {"k": k, "n": n, "score": score, "stderr": error}
        inputs[address] = Artifact(
            folder, {"fingerprint": changed.get(address, prints[address]), "facts": facts}, "0" * 64
        )
    spec = {
        "title": "T",
        "scale": scale,
        "tasks": [["a", "Task A"], ["b", "Task B"]],
        "rows": ROWS,
        "cells": fingerprints,
    }
    return made_job(spec, reference, inputs, draft)


def made_job(spec: dict[str, Any], reference: str | None, inputs: dict[str, Artifact], draft: Path) -> Job:
    spec = {"step": "table", "recipe": 2, **spec} | ({"reference": reference} if reference else {})
    return Job(json.dumps(spec), inputs, draft, draft.parent, {}, "f" * 64, None)


def test_the_csv_holds_every_cell_with_error_counts_and_the_average(tmp_path: Path) -> None:
    table = job(tmp_path)
    build(table)
    with open(table.folder / "table2.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "category": "Pivot",
        "label": "The pivot",
        "method": "none",
        "models": "p",
        "model": "base/p",
        "scale": "miniature",
        "a": "25.00",
        "a_stderr": "21.65",
        "a_k": "1",
        "a_n": "4",
        "b": "75.00",
        "b_stderr": "21.65",
        "b_k": "3",
        "b_n": "4",
        "average": "50.00",
        "average_stderr": "15.31",
    }
    assert (second["a"], second["b"], second["average"], second["average_stderr"]) == (
        "100.00",
        "0.00",
        "50.00",
        "0.00",
    )
    assert table.facts == {"rows": 2, "scale": "miniature"}


def test_the_markdown_has_one_line_a_row_under_its_category(tmp_path: Path) -> None:
    table = job(tmp_path)
    build(table)
    lines = (table.folder / "table2.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "|  | Task A | Task B | average |",
        "|---|---:|---:|---:|",
        "| **Pivot** | | | |",
        "| The pivot | 25.00 ±21.65 | 75.00 ±21.65 | 50.00 ±15.31 |",
        "| **Fused** | | | |",
        "| A merge | 100.00 ±0.00 | 0.00 ±0.00 | 50.00 ±0.00 |",
    ]
    assert "Task A n=4, Task B n=4" in lines[-1]


@pytest.mark.parametrize("scale", SCALES)
def test_numbers_of_models_below_the_papers_scale_are_labelled_as_such(tmp_path: Path, scale: str) -> None:
    table = job(tmp_path, scale)
    build(table)
    page = (table.folder / "table2.md").read_text()
    expected = {"small": "**Small models: ", "miniature": "**Miniature models on generated tasks: "}
    assert re.findall(r"^\*\*\w+ models.*?: ", page, re.MULTILINE) == ([expected[scale]] if scale != "paper" else [])
    assert f",{scale}," in (table.folder / "table2.csv").read_text()


def test_a_cell_of_another_study_is_refused_by_name(tmp_path: Path) -> None:
    table = job(tmp_path, **{"scores/merged/m/b": "9" * 64})
    with pytest.raises(
        UserError,
        match=r"results/scores/merged/m/b\.json was made by another study .*snakemake results/scores/merged/m/b\.json",
    ):
        build(table)
    assert list(table.folder.iterdir()) == []


def test_a_cell_the_rule_did_not_declare_is_refused(tmp_path: Path) -> None:
    table = job(tmp_path)
    del table.inputs["scores/base/p/a"]
    with pytest.raises(UserError, match="scores/base/p/a is not among this job's inputs"):
        build(table)


def replicated(folder: Path, reference: str | None = None) -> Job:
    """Two rows of two replicates each over tasks a and b."""
    cells = {
        ("t/x-1", "a"): (1, 4, 25.0, 21.650635),
        ("t/x-1", "b"): (1, 4, 25.0, 21.650635),
        ("t/x-2", "a"): (3, 4, 75.0, 21.650635),
        ("t/x-2", "b"): (1, 4, 25.0, 21.650635),
        ("t/y-1", "a"): (2, 4, 50.0, 25.0),
        ("t/y-1", "b"): (2, 4, 50.0, 25.0),
        ("t/y-2", "a"): (4, 4, 100.0, 0.0),
        ("t/y-2", "b"): (2, 4, 50.0, 25.0),
    }
    draft = folder / ".seeds.csv.token.draft"
    draft.mkdir()
    inputs, fingerprints = {}, {}
    for i, ((model, task), (k, n, score, error)) in enumerate(cells.items()):
        facts = {"k": k, "n": n, "score": score, "stderr": error}
        inputs[f"scores/{model}/{task}"] = Artifact(folder, {"fingerprint": f"{i}" * 64, "facts": facts}, "0" * 64)
        fingerprints.setdefault(model, {})[task] = f"{i}" * 16
    rows = [[["t/x-1", "t/x-2"], "C", "X", "sft", "p"], [["t/y-1", "t/y-2"], "C", "Y", "kd", "q"]]
    spec = {"title": "T", "scale": "miniature", "tasks": [["a", "A"], ["b", "B"]], "rows": rows, "cells": fingerprints}
    return made_job(spec, reference, inputs, draft)


def test_a_row_of_replicates_is_their_mean_with_the_paired_difference_to_the_reference(tmp_path: Path) -> None:
    table = replicated(tmp_path, "t/x-1")
    build(table)
    with open(table.folder / "seeds.csv", newline="") as file:
        x, y = csv.DictReader(file)
    # averages by replicate: x 25, 50; y 50, 75. Spread of two values is half their difference.
    assert (x["a"], x["a_stderr"], x["a_k"], x["a_n"]) == ("50.00", "25.00", "4", "8")
    assert (x["average"], x["average_stderr"], x["gain_percent"], x["difference"], x["difference_stderr"]) == (
        "37.50",
        "12.50",
        "+0.00",
        "+0.00",
        "0.00",
    )
    assert (y["average"], y["average_stderr"], y["gain_percent"], y["difference"], y["difference_stderr"]) == (
        "62.50",
        "12.50",
        "+66.67",
        "+25.00",
        "0.00",
    )
    assert x["model"] == "t/x-1 t/x-2"
    text = (table.folder / "seeds.md").read_text()
    assert "|  | A | B | average | vs X (points) | vs X (%) |" in text
    assert "| Y | 75.00 ±25.00 | 50.00 ±0.00 | 62.50 ±12.50 | +25.00 ±0.00 | +66.67 |" in text
    assert "one standard error over 2 replicates (A n=4, B n=4)" in text


def test_gains_are_relative_to_the_reference_row(tmp_path: Path) -> None:
    table = job(tmp_path, reference="base/p")
    build(table)
    with open(table.folder / "table2.csv", newline="") as file:
        assert [row["gain_percent"] for row in csv.DictReader(file)] == ["+0.00", "+0.00"]
    assert "vs The pivot (%)" in (table.folder / "table2.md").read_text()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"score": 26.0}, "expected the score 25.0 and its error 21.650635"),
        ({"k": 5}, "expected k right of n items"),
        ({"n": 0, "k": 0}, "expected k right of n items"),
        ({"k": True}, "expected k right of n items"),
    ],
)
def test_a_cell_whose_numbers_do_not_go_together_is_refused(
    tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    table = job(tmp_path)
    table.inputs["scores/base/p/a"].manifest["facts"].update(changed)
    with pytest.raises(DamagedError, match=rf"results/scores/base/p/a\.json: {expected}, found .*snakemake .* -f"):
        build(table)
