"""The documents name only commands, options, make targets, files, study keys and messages that exist."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import get_argument_parser

from llmfusion.cli.main import COMMANDS
from llmfusion.study import strict_yaml
from llmfusion.study.addresses import address_of
from llmfusion.study.kinds import kind_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/llmfusion"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "config/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
    *sorted(  # their comments
        str(p.relative_to(ROOT))
        for folder in ("config", "config/examples", "envs", "profiles/*")
        for p in ROOT.glob(f"{folder}/*.yaml")
        if p.name != "extended.yaml"
    ),
]
FOLDERS = ("src", "tests", "config", "docs", "rules", "profiles", "envs", "benchmarks", ".ci")
USERS_FILES = {"config/mine.yaml", "config/extended.yaml", "profiles/my-site"}  # made by the reader
SNAKEMAKE_KEYS = {"jobs", "gpu", "gres", "constraint", "gpu_model", "slurm_extra"}  # in examples of an overlay
MAKE_TARGETS = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _code(document: str) -> Iterator[str]:
    """All code in a document: lines of fenced blocks, and spans between backticks; all comments of a YAML file."""
    if document.endswith(".yaml"):
        yield from re.findall(r"(?:^|\s)# ?(.*)$", _text(document), re.MULTILINE)
        return
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
        for root, path in ((root, path.rstrip(".")) for root, path in named):
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
    spans = re.findall(r"`(?!(?:error|damaged|disk): )([a-z_]+: [^`\n]+)`", _text(document))
    if document.endswith(".yaml"):  # an entry that its comments show
        spans = [entry for line in _code(document) for entry in re.findall(r"^ *[a-z-]+: ({<<: .*)", line)]
        spans = [entry.replace("{<<", "{init", 1).lstrip("{") for entry in spans]
    for span in spans:
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


@each_document
def test_every_option_of_snakemake_in_the_documents_is_one_of_the_installed_snakemake(document):
    options = set(get_argument_parser()._option_string_actions)
    for line in _code(document):
        for words in re.findall(r"(?:^|[\s/(])snakemake ([^|&;#]*)", line):
            for option in re.findall(r"(?<!\S)(--?[a-zA-Z][\w-]*)", words):
                assert option in options, line


@each_document
def test_every_profile_of_the_documents_exists(document):
    for line in _code(document):
        for profile in re.findall(r"--(?:workflow-)?profile (\S+)", line):
            folder = profile.rstrip("`,.")
            assert folder in USERS_FILES or _is_placeholder(folder) or (ROOT / folder / "config.yaml").exists(), line


@each_document
def test_every_result_of_the_documents_has_the_address_of_a_kind(document):
    """In spans and commands; blocks that show a rule name it with wildcards."""
    added = re.findall(r'address="([^"{]+)', _text(document))  # of kinds that the page itself adds
    for line in _code(document):
        for path in re.findall(r"(?<![\w./-])(results/[\w./-]+(?:manifest\.json|\.csv|/[\w-]+\.json))(?![\w*{])", line):
            is_own = any(path.startswith(f"results/{address}") for address in added)
            if path not in ("results/cost.csv", "results/report.html") and not is_own and not _is_placeholder(path):
                assert kind_of(address_of(path)), line


@each_document
def test_every_environment_variable_and_class_of_the_documents_is_in_the_code(document):
    """Also those of libraries: what the project sets or reads it names. Formulas are no code."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in _code_files())
    text = _text(document)
    names = r"(?<![\w<\\])([A-Z][A-Z0-9]*_[A-Z0-9_]+|[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]+)+)\b"
    for block in re.findall(r"^```(?!math)\w*.*?\n(.*?)^```|`([^`\n]+)`", text, re.MULTILINE | re.DOTALL):
        for name in re.findall(names, "".join(block)):
            assert name in code or f"class {name}(" in text, name


def _code_files() -> Iterator[Path]:
    yield ROOT / "Makefile"
    yield ROOT / "Snakefile"
    for folder in ("src", "tests", "rules", "profiles", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".smk", ".yaml") and path != Path(__file__):
                yield path


@each_document
def test_every_key_in_the_yaml_of_the_documents_stands_where_a_study_has_it(document):
    """A block is the beginning of a study, or entries of one of its sections."""
    schema = json.loads(_text("config/schema.json"))
    sections = [schema["properties"][name] for name in ("datasets", "mixes", "tasks", "tables")]
    models = _node(schema["properties"]["models"], schema)
    sections += list(models["properties"].values())
    added = set(re.findall(r'section=\("(\w+)"', _text(document)))  # sections that the page itself adds
    for block in re.findall(r"^```yaml(?: study)?\n(.*?)^```", _text(document), re.MULTILINE | re.DOTALL):
        data = {key: value for key, value in yaml.load(block, strict_yaml._Loader).items() if not key.startswith("x-")}
        data = {key: value for key, value in data.items() if key not in added}
        mistakes = [list(_unknown_keys(data, node, schema)) for node in (schema, *sections)]
        own = set(re.findall(r"^    (\w+): .* = ", _text(document), re.MULTILINE))  # options of plug-ins on the page
        assert any(all(m.split(".")[-1] in own for m in each) for each in mistakes), (block, mistakes[0])


def _node(node: Any, schema: Any) -> Any:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _unknown_keys(data: Any, node: Any, schema: Any, place: str = "") -> Iterator[str]:
    """Places of keys that no reading of a schema's node allows."""
    node = _node(node, schema)
    if options := node.get("oneOf") or node.get("anyOf"):
        yield from min((list(_unknown_keys(data, option, schema, place)) for option in options), key=len)
    elif isinstance(data, list):
        for item in data:
            yield from _unknown_keys(item, node.get("items", {}), schema, place)
    elif isinstance(data, dict):
        names = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
        for key, value in data.items():
            inner = node.get("properties", {}).get(key, names)
            if isinstance(inner, dict):
                yield from _unknown_keys(value, inner, schema, f"{place}.{key}")
            elif inner is not True:
                yield f"{place}.{key}"


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
