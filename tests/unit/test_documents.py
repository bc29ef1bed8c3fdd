"""The documents name only commands, options, make targets, files, study keys and messages that exist."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmfusion.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/llmfusion"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "config/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
FOLDERS = ("src", "tests", "config", "docs", "rules", "profiles", "envs", "benchmarks", ".ci")
USERS_FILES = {"config/mine.yaml", "config/extended.yaml", "profiles/my-site"}  # made by the reader
SNAKEMAKE_KEYS = {"jobs", "gpu", "gres", "constraint", "gpu_model", "slurm_extra"}  # in examples of an overlay
MAKE_TARGETS = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _code(document: str) -> Iterator[str]:
    """All code in a document: lines of fenced blocks, and spans between backticks."""
    prose = []
    for number, part in enumerate(re.split(r"^```.*$", _text(document), flags=re.MULTILINE)):
        if number % 2:
            yield from part.splitlines()
        else:
            prose.append(part)
    yield from re.findall(r"`([^`\n]+)`", "\n".join(prose))


def _is_placeholder(path: str) -> bool:
    """Whether a path has a part to be filled in: NAME, RULE, {dataset}, ``*`` or an ellipsis."""
    return bool(re.search(r"[A-Z]{2,}|[{*<]|\.\.\.", path))


@each_document
def test_every_command_of_the_documents_exists_and_has_the_options_shown(document):
    for line in _code(document):
        for command, rest in re.findall(r"(?:^|[\s/(])llmfusion ([a-z]\w*)([^|&;#]*)", line):
            assert command in COMMANDS, line
            source = PACKAGE / f"cli/{command}.py"
            own = rest.split(" -- ")[0]  # what follows is another command
            for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", own):
                assert f'"{option}"' in source.read_text(), line


@each_document
def test_no_document_names_a_module_of_a_command_where_the_command_is_meant(document):
    assert not re.findall(r"python -m llmfusion\.\S+|llmfusion\.cli\.\w+", _text(document))


@each_document
def test_every_make_target_of_the_documents_exists(document):
    for line in _code(document):
        for target in re.findall(r"(?:^|\s)make ([a-z.][\w./-]*)", line):
            assert target in MAKE_TARGETS, line


@each_document
def test_every_benchmark_of_the_documents_exists(document):
    for name in re.findall(r"benchmarks\.(\w+)", _text(document)):
        assert (ROOT / f"benchmarks/{name}.py").is_file(), name


@each_document
def test_every_path_of_the_documents_exists_or_has_a_placeholder(document):
    folders = "|".join(map(re.escape, FOLDERS))
    rooms = "|".join(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
    made = set(re.findall(r"^```\w+ title=(\S+)$", _text(document), re.MULTILINE))  # files that the page itself writes
    for line in _code(document):
        named = [(ROOT, path) for path in re.findall(rf"(?<![\w./{{-])((?:{folders})/[\w./*{{}}-]+)", line)]
        named += [(PACKAGE, path) for path in re.findall(rf"^((?:{rooms})/[\w./]+\.py)$", line)]
        for root, path in named:
            known = path in USERS_FILES | MAKE_TARGETS | made or _is_placeholder(path)
            assert known or (root / path).exists(), f"{path} in: {line}"


@each_document
def test_every_link_of_the_documents_leads_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _text(document)):
        path, _, heading = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        assert not heading or heading in set(_anchors(file)), target


def _anchors(file: Path) -> Iterator[str]:
    """Anchors of a Markdown file's headings, as GitHub derives them."""
    for title in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@each_document
def test_every_key_of_the_documents_is_one_of_a_study_or_a_profile(document):
    keys = set(_properties(json.loads(_text("config/schema.json")))) | SNAKEMAKE_KEYS
    for profile in ROOT.glob("profiles/*/config.yaml"):
        keys |= set(_mapping_keys(yaml.safe_load(profile.read_text())))
    for span in re.findall(r"`(?!(?:error|damaged|disk): )([a-z_]+: [^`\n]+)`", _text(document)):
        for key in [span.partition(":")[0], *re.findall(r"[{,] ?([a-z_]+): ", span)]:
            assert key in keys or re.search(rf"^tables: {{{key}:", span), span


def _properties(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for value in schema.values():
            yield from _properties(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _properties(value)


def _mapping_keys(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from _mapping_keys(value)


def test_every_message_that_the_cluster_guide_explains_is_one_of_the_program():
    texts = [text for file in PACKAGE.rglob("*.py") for text in _strings(file)]
    section = _text("docs/cluster.md").split("## Where is my error?")[1].split("\n## ")[0]
    seen = [row.split("|")[1] for row in section.splitlines() if row.startswith("| ")][1:]
    quoted = [span for cell in seen for span in re.findall(r"`([^`]+)`", cell)]
    snakemakes = ("Directory cannot be locked", "Falling back to 'sacct'", "squeue -j JOBID -o %r")
    for span in [span for span in quoted if span not in snakemakes]:
        fragments = [part.strip() for part in re.split(r"work/\S+lease|\.\.\.|\bN\b", span) if len(part.strip()) > 3]
        assert all(any(part in text for text in texts) for part in fragments), span


def _strings(file: Path) -> Iterator[str]:
    """String literals of a module; of f-strings, their constant parts."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
