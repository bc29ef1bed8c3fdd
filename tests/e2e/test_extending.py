"""The worked examples of docs/extending.md, taken from the text of the page and run in a tiny study from end to end.

A fenced block says what it is behind its language: ``title=PATH`` is a new file, ``append=PATH`` is added to the end of
a file, ``study`` is merged into the study, ``run`` holds commands that must succeed.
"""

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.e2e.conftest import Project
from tests.project import ROOT, environment

PAGE = ROOT / "docs/extending.md"
FENCE = re.compile(r"^```(\w+)[ ]+(\w+)(?:=(\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = ("layout", "fusion target", "merge method", "task", "kind of artifact")


class Block(NamedTuple):
    """A fenced block that the tests execute."""

    section: str
    what: str
    path: str
    text: str


def blocks() -> list[Block]:
    """All executable blocks of the page, in order, under the heading they stand below."""
    text = PAGE.read_text(encoding="utf-8")
    headings = [(match.start(), match[1]) for match in re.finditer(r"^## (.*)$", text, re.MULTILINE)]
    out = []
    for match in FENCE.finditer(text):
        section = next(title for start, title in reversed(headings) if start < match.start())
        out.append(Block(section, match[2], match[3] or "", match[4]))
    return out


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``more`` merged into ``base``, mappings key by key."""
    out = dict(base)
    for key, value in more.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def command(folder: Path, line: str) -> str:
    """Output of one command of the page; it must succeed."""
    words = {**environment(), "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=words, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def extended(project: Project) -> Path:
    """A copy of the project with every example of the page in it, its commands executed."""
    folder = project("extended")
    study = yaml.safe_load((folder / "config/tiny.yaml").read_text())
    study["directory"] = "runs/extended"
    commands = []
    for block in blocks():
        path = folder / block.path
        if block.what == "title":
            assert not path.exists(), f"{block.path} is there already: an example adds files"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.what == "append":
            path.write_text(path.read_text() + "\n\n" + block.text)
        elif block.what == "study":
            study = merged(study, yaml.safe_load(block.text))
        elif block.what == "run":
            commands += block.text.strip().splitlines()
    (folder / "config/extended.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "commands.log").write_text("\n".join(command(folder, line) for line in commands))
    return folder


def read(folder: Path, address: str) -> dict[str, Any]:
    """The manifest of an artifact of the extended study."""
    name = address if address.startswith("scores/") else f"{address}/manifest"
    content: dict[str, Any] = json.loads((folder / f"runs/extended/results/{name}.json").read_text())
    return content


def test_the_page_has_the_five_worked_examples() -> None:
    sections = {block.section for block in blocks() if block.what == "title"}
    for example in EXAMPLES:
        assert any(example in section for section in sections), example


def test_each_plug_in_is_one_file_and_a_kind_three() -> None:
    for example in EXAMPLES:
        files = {b.path for b in blocks() if b.what in ("title", "append") and example in b.section}
        source = {path for path in files if not path.startswith("my-data/")}
        assert len(source) <= (3 if example in ("kind of artifact", "task") else 1), source


def test_the_new_layout_gave_samples(extended: Path) -> None:
    facts = read(extended, "data/dataset/recipes")["facts"]
    assert facts["samples"] == 2
    sample = json.loads(
        (extended / "runs/extended/results/data/dataset/recipes/samples.jsonl").read_text().splitlines()[0]
    )
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]


def test_the_new_target_learned_its_parameters(extended: Path) -> None:
    folder = extended / "runs/extended/results/models/trained/trust-code"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = [record["weight"]["base/code"] for record in records]
    assert min(weights) > 0
    assert len({round(weight, 6) for weight in weights}) > 1
    assert "Trusted distillation" in (folder / "README.md").read_text()


def test_the_new_merge_method_used_the_number_of_the_layer(extended: Path) -> None:
    folder = extended / "runs/extended/results/models/merged/by-depth"
    rows = {row["tensor"]: row for row in csv.DictReader((folder / "merge_report.csv").open())}
    shares = {
        int(found[1]): float(row["share"])
        for name, row in rows.items()
        if (found := re.search(r"layers\.(\d+)\.mlp\.up_proj", name))
    }
    assert len(shares) > 1
    assert sorted(shares.values()) == list(shares.values())
    assert len(set(shares.values())) == len(shares)


def test_the_new_task_was_asked_and_graded(extended: Path) -> None:
    cell = read(extended, "scores/trained/sft/capitals")
    assert cell["facts"]["n"] == 3
    assert cell["facts"]["asked"]["format"] == "phrase"


def test_the_new_kind_was_made_and_is_behind_its_manifest(extended: Path) -> None:
    manifest = read(extended, "reports/tokenizers/pivot-code")
    assert manifest["facts"]["tokens"]["base/pivot"] > 0
    assert set(manifest["inputs"]) == {"models/base/code", "models/base/pivot"}
    output = command(extended, "llmfusion verify runs/extended/results/reports/tokenizers/pivot-code/manifest.json")
    assert "all match" in output


def test_schema_help_and_tables_know_the_new_names(extended: Path) -> None:
    command(extended, "python docs/generate.py")
    schema = (extended / "config/schema.json").read_text()
    for name in ("recipe", "trust", "by_depth", "phrase", "tokenizer_reports"):
        assert f'"{name}"' in schema, name
    assert "by_depth" in command(extended, "llmfusion merge --help")
    assert "phrase" in command(extended, "llmfusion grade --help")
    documents = (extended / "config/README.md").read_text() + (extended / "docs/extending.md").read_text()
    for words in ("| `trust` |", "`method: by_depth`", "| `recipe` |", "| `capitals` |"):
        assert words in documents, words


def test_the_extended_study_is_up_to_date_when_it_is_made(extended: Path) -> None:
    targets = "results/models/trained/trust-code/manifest.json results/reports/tokenizers/pivot-code/manifest.json"
    assert "Nothing to be done" in command(extended, f"snakemake --configfile config/extended.yaml -c1 -n -- {targets}")
