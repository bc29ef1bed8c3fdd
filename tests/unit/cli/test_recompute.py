"""``llmfusion verify --recompute``: cells are graded again from stored answers, and tables made again from cells."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts.job import Job, Request, run_job
from llmfusion.artifacts.store import read
from llmfusion.cli.main import main
from llmfusion.io.digests import canonical
from llmfusion.io.jsonl import write_jsonl
from llmfusion.steps import score, table
from llmfusion.study.addresses import manifest_of, output_of
from tests.unit.steps.test_score import ANSWERS, ITEMS

MODELS = ("base/pivot", "base/code")
TASKS = ("letter", "code")  # one is compared, one runs programs in the sandbox
TABLE = Path("results/t.csv")


def make(address: str, spec: dict[str, Any], build: Any, *inputs: str) -> None:
    text = canonical({"recipe": 1, **spec})
    run_job(Request(text, Path(output_of(address)), [str(manifest_of(Path(output_of(i)))) for i in inputs]), build)


def staged(task: str) -> Any:
    def build(job: Job) -> None:
        write_jsonl(job.folder / "items.jsonl", ({"item": i, **item} for i, item in enumerate(ITEMS[task])))
        job.facts.update(items=3, license="mit")

    return build


def answered(model: str) -> Any:
    def build(job: Job) -> None:
        for task in TASKS:
            given = ANSWERS[task] if model == "base/pivot" else list(reversed(ANSWERS[task]))
            rows = ({"item": i, "prompt": "p", "answer": answer} for i, answer in enumerate(given))
            write_jsonl(job.folder / f"{task}.jsonl", rows)
        facts = {task: {"items": 3, "format": task} for task in TASKS}
        job.facts.update(tasks=facts, backend="lm-eval", decoding="greedy")

    return build


@pytest.fixture(autouse=True)
def _study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in TASKS:
        make(f"data/tasks/{task}", {"step": "stage_tasks"}, staged(task))
    cells: dict[str, dict[str, str]] = {}
    for model in MODELS:
        make(f"answers/{model}/all", {"step": "answer"}, answered(model))
        for task in TASKS:
            spec = {"step": "score", "model": model, "task": task, "format": task, "batch": "all", "scale": "miniature"}
            address = f"scores/{model}/{task}"
            make(address, spec, score.build, f"answers/{model}/all", f"data/tasks/{task}")
            cells.setdefault(model, {})[task] = read(output_of(address)).manifest["fingerprint"][:16]
    rows = [[[model], "Base", model, "none", model] for model in MODELS]
    spec = {"step": "table", "title": "T", "scale": "miniature", "tasks": [[t, t] for t in TASKS], "rows": rows}
    inputs = [f"scores/{model}/{task}" for model in MODELS for task in TASKS]
    make("tables/t", {**spec, "cells": cells}, table.build, *inputs)


def forge(manifest: Path, **facts: Any) -> None:
    """Other facts under an honest sha256; what was made from the manifest follows, so that all hashes agree."""
    body = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
    before = hashlib.sha256(manifest.read_bytes()).hexdigest()
    body["facts"].update(facts)
    rewrite(manifest, body)
    after = hashlib.sha256(manifest.read_bytes()).hexdigest()
    for other in Path("results").rglob("*.json"):
        if before in (text := other.read_text()) and not other.name.endswith("provenance.json"):
            rewrite(other, {k: v for k, v in json.loads(text.replace(before, after)).items() if k != "sha256"})


def rewrite(manifest: Path, body: dict[str, Any]) -> None:
    own = hashlib.sha256(canonical(body).encode()).hexdigest()
    manifest.write_text(json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n")
    record = manifest.with_suffix(".provenance.json")
    content = json.loads(record.read_text()) | {"manifest": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    content.pop("sha256")
    content["sha256"] = hashlib.sha256(canonical(content).encode()).hexdigest()
    record.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def test_an_honest_table_is_made_again_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--recompute", str(TABLE)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "4 cells graded again, 1 tables made again, 2 datasets, task sets and base models: all match" in printed.out


def test_a_cell_that_its_answers_do_not_give_is_named_although_every_hash_agrees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    forge(Path("results/scores/base/code/code.json"), right="111", k=3, score=100.0, stderr=0.0)
    assert main(["verify", str(TABLE)]) == 0
    capsys.readouterr()
    assert main(["verify", "--recompute", str(TABLE)]) == 1
    cell, whole = sorted(line for line in capsys.readouterr().err.splitlines())
    assert cell.startswith(
        "mismatch: results/scores/base/code/code.json: is another one when it is made again: k 3, now 2"
    )
    assert "right '111', now '011'" in cell
    assert whole == "mismatch: results/t.json: is another one when it is made again: t.csv differs; t.md differs"


def test_a_table_that_its_cells_do_not_give_is_named_although_every_hash_agrees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    TABLE.write_text(TABLE.read_text().replace("66.67", "99.99"))
    manifest = Path("results/t.json")
    body = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}
    body["files"]["t.csv"]["sha256"] = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    rewrite(manifest, body)
    assert main(["verify", str(TABLE)]) == 0
    assert main(["verify", "--recompute", str(TABLE)]) == 1
    assert "results/t.json: is another one when it is made again: t.csv differs\n" in capsys.readouterr().err


def test_only_the_cells_behind_the_target_are_graded_again(capsys: pytest.CaptureFixture[str]) -> None:
    forge(Path("results/scores/base/code/letter.json"), k=0, score=0.0)
    assert main(["verify", "--recompute", "results/scores/base/pivot/letter.json"]) == 0
    assert "1 cells graded again, 0 tables made again" in capsys.readouterr().out


def test_a_cell_whose_answers_are_damaged_is_not_graded_again(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Path("results/answers/base/code/all/code.jsonl")
    answers.write_bytes(answers.read_bytes()[:-1])
    assert main(["verify", "--recompute", str(TABLE)]) == 1
    printed = capsys.readouterr()
    assert "2 cells graded again, 1 tables made again" in printed.out
    [line] = printed.err.splitlines()
    assert "results/answers/base/code/all/code.jsonl: has " in line
    assert "Traceback" not in printed.err
