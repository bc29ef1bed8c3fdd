"""A table from hand-made cells: numbers, order, and the refusal of cells made for another study."""

import csv
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts import Artifact
from llmfusion.errors import UserError
from llmfusion.step import Job
from llmfusion.table import MINIATURE, build

CELLS = {
    ("base/p", "a"): (1, 4, 25.0, 21.650635),
    ("base/p", "b"): (3, 4, 75.0, 21.650635),
    ("merged/m", "a"): (4, 4, 100.0, 0.0),
    ("merged/m", "b"): (0, 4, 0.0, 0.0),
}
ROWS = [["base/p", "Pivot", "The pivot", "none", "p"], ["merged/m", "Fused", "A merge", "pairwise-ta", "code+math"]]


def job(folder: Path, scale: str = "miniature", **changed: str) -> Job:
    draft = folder / ".table2.csv.token.draft"
    draft.mkdir()
    prints = {f"scores/{m}/{t}": f"{i}" * 64 for i, (m, t) in enumerate(CELLS)}
    asked: dict[str, Any] = {m: {t: prints[f"scores/{m}/{t}"][:16] for t in "ab"} for m in ("base/p", "merged/m")}
    inputs = {}
    for (model, task), (k, n, score, error) in CELLS.items():
        address = f"scores/{model}/{task}"
        facts = {"k": k, "n": n, "score": score, "stderr": error}
        inputs[address] = Artifact(folder, {"fingerprint": changed.get(address, prints[address]), "facts": facts}, "0" * 64)
    spec = {"title": "T", "scale": scale, "tasks": [["a", "Task A"], ["b", "Task B"]], "rows": ROWS, "cells": asked}
    return Job(spec, inputs, draft, folder, {}, "f" * 64, None)


def test_the_csv_holds_every_cell_with_error_counts_and_the_average(tmp_path: Path) -> None:
    given = job(tmp_path)
    build(given)
    with open(given.folder / "table2.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "category": "Pivot", "label": "The pivot", "method": "none", "models": "p", "model": "base/p", "scale": "miniature",
        "a": "25.00", "a_stderr": "21.65", "a_k": "1", "a_n": "4", "b": "75.00", "b_stderr": "21.65", "b_k": "3", "b_n": "4",
        "average": "50.00", "average_stderr": "15.31",
    }  # fmt: skip
    assert (second["a"], second["b"], second["average"], second["average_stderr"]) == ("100.00", "0.00", "50.00", "0.00")
    assert given.facts == {"rows": 2, "scale": "miniature"}


def test_the_markdown_has_one_line_a_row_under_its_category(tmp_path: Path) -> None:
    given = job(tmp_path)
    build(given)
    lines = (given.folder / "table2.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "|  | Task A | Task B | average |",
        "|---|---:|---:|---:|",
        "| **Pivot** | | | |",
        "| The pivot | 25.00 ±21.65 | 75.00 ±21.65 | 50.00 ±15.31 |",
        "| **Fused** | | | |",
        "| A merge | 100.00 ±0.00 | 0.00 ±0.00 | 50.00 ±0.00 |",
    ]
    assert "Task A n=4, Task B n=4" in lines[-1]


@pytest.mark.parametrize(("scale", "labelled"), [("miniature", True), ("paper", False)])
def test_miniature_numbers_are_labelled_as_such(tmp_path: Path, scale: str, labelled: bool) -> None:
    given = job(tmp_path, scale)
    build(given)
    assert (MINIATURE in (given.folder / "table2.md").read_text()) is labelled
    assert f",{scale}," in (given.folder / "table2.csv").read_text()


def test_a_cell_of_another_study_is_refused_by_name(tmp_path: Path) -> None:
    given = job(tmp_path, **{"scores/merged/m/b": "9" * 64})
    with pytest.raises(UserError, match=r"results/scores/merged/m/b\.json was made by another study .*snakemake results/scores/merged/m/b\.json"):
        build(given)
    assert list(given.folder.iterdir()) == []


def test_a_cell_the_rule_did_not_declare_is_refused(tmp_path: Path) -> None:
    given = job(tmp_path)
    del given.inputs["scores/base/p/a"]
    with pytest.raises(UserError, match="scores/base/p/a is not among this job's inputs"):
        build(given)
