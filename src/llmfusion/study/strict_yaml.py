"""YAML as people expect it: 1.2 numbers and booleans, no duplicate keys, and a line number for every key.

PyYAML follows YAML 1.1, where ``1e-6`` is a string, ``no`` is false and ``1:30`` is 90, and it keeps the last of two
equal keys without a word. A study must not be able to change its meaning that way. Nor can a file take the reader's
time or memory: its size, its depth and the number of its entries are limited, far above what a study has.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

KeyPath = tuple[str | int, ...]
MAX_BYTES = 2**20  # the paper's study has 16 KB, twenty replicates of it have 260 KB
MAX_NODES = 40_000  # keys and values; twenty replicates of the paper's study have 18,000
MAX_DEPTH = 50
MAX_INTEGER = 2**63  # what programs in other languages, and files of tensors, hold
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


class YamlError(ValueError):
    """The file cannot be read as YAML. ``problems`` holds ``(line, message)`` pairs, lines counted from 1."""

    def __init__(self, problems: list[tuple[int, str]]):
        super().__init__("; ".join(f"line {line}: {text}" for line, text in problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """Of the text of a study. Stops where it is nested too deeply, or holds too much: Python would recurse, or wait."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        if self.depth > MAX_DEPTH:
            raise YamlError([(line, f"nested more than {MAX_DEPTH} levels deep")])
        if self.nodes > MAX_NODES:
            raise YamlError([(line, f"the file has more than {MAX_NODES:,} keys and values; no study is so large")])
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if not re.fullmatch(r"[-+]?[0-9]+", text):  # YAML 1.2: 010 is ten, 1_000 and 1:30 are strings
        raise ConstructorError(None, None, f"expected digits, got {text[:60]!r}", node.start_mark)
    if len(text) > 400 or abs(int(text)) >= MAX_INTEGER:
        raise ConstructorError(None, None, f"the number {_shortened(text)} is too large: 2^63 or more", node.start_mark)
    return int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise ConstructorError(None, None, f"expected a number, got {text[:60]!r}", node.start_mark) from None


def _bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = loader.construct_scalar(node)
    if text.lower() not in ("true", "false"):
        raise ConstructorError(None, None, f"expected true or false, got {text[:60]!r}", node.start_mark)
    return bool(text.lower() == "true")


def _shortened(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:20]}... ({len(text)} digits)"


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:bool", _bool)


def load(path: str | Path) -> tuple[Any, dict[KeyPath, int]]:
    """Read one YAML document.

    Returns the data and, for every mapping key and list item, its line (from 1) under its path, e.g.
    ``("datasets", "orca", "rows")``. Raises :class:`YamlError` for what is no regular file of at most ``MAX_BYTES``,
    bytes that are not UTF-8, bad syntax, a second equal key, a key that is no word, a type that a study has no use
    for, and for more depth, or anchors that make more entries, than a study has; ``OSError`` if the file cannot be
    opened.
    """
    text = _text(Path(path))
    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError([(mark.line + 1 if mark else 1, error.problem or str(error))]) from None
    except yaml.reader.ReaderError as error:  # of a character that is not allowed
        line = text.count("\n", 0, error.position) + 1
        raise YamlError([(line, f"the character {error.character:#06x} is not allowed in YAML")]) from None


def _text(path: Path) -> str:
    """The text of a file. Raises as :func:`load` does."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a FIFO would wait for somebody to write to it
        raise YamlError([(1, "is no regular file")])
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlError([(1, f"is larger than {MAX_BYTES // 2**20} MiB; no study is")])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError([(line, f"not UTF-8: byte {error.start} is {content[error.start]:#x}")]) from None


def _load(text: str) -> tuple[Any, dict[KeyPath, int]]:
    loader = _Loader(text)  # looks for characters that are not allowed
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        visitor = _KeyVisitor()
        if node is not None:
            visitor.visit(node, (), lines)
        if visitor.problems:
            raise YamlError(visitor.problems)
        return (loader.construct_document(node) if node is not None else None), lines
    finally:
        loader.dispose()


def load_text(text: str) -> Any:
    """A value given on the command line, read by the same rules: ``1e-6`` is a number, ``no`` a word."""
    return yaml.load(text, _Loader)  # a SafeLoader


class _KeyVisitor:
    """Records lines and finds duplicate keys.

    Before merge keys are flattened: an override of a merged key is no duplicate.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[int, str]] = []
        self.visited = 0

    def visit(
        self, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], above: frozenset[int] = frozenset()
    ) -> None:
        self.visited += 1
        if self.visited > MAX_NODES:
            text = f"anchors that repeat anchors make more than {MAX_NODES:,} entries of this file"
            raise YamlError([(node.start_mark.line + 1, text)])
        if id(node) in above:
            self.problems.append((node.start_mark.line + 1, "an anchor contains itself"))
            return
        if len(above) >= MAX_DEPTH:
            raise YamlError([(node.start_mark.line + 1, f"nested more than {MAX_DEPTH} levels deep")])
        if node.tag not in TAGS:
            self.problems.append((node.start_mark.line + 1, f"a study has no values of type {_written(node.tag)}"))
            return
        above = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines.setdefault((*path, i), item.start_mark.line + 1)
                self.visit(item, (*path, i), lines, above)
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, path, lines, above)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], above: frozenset[int]) -> None:
        seen: dict[str, int] = {}
        merges = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag.endswith(":merge"):
                merges.append(value)
                continue
            if (problem := _key_problem(key)) is not None:
                self.problems.append((line, problem))
                continue
            if key.value in seen:
                self.problems.append((line, f"key {key.value!r} again (first on line {seen[key.value]}); keep one"))
            seen.setdefault(key.value, line)
            lines[(*path, key.value)] = line
            self.visit(value, (*path, key.value), lines, above)
        for merged in merges:
            for source in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
                inherited: dict[KeyPath, int] = {}
                before = self.problems
                self.problems = []  # what is wrong inside the anchor is reported where it is defined
                self.visit(source, path, inherited, above)
                self.problems = before + [problem for problem in self.problems if "contains itself" in problem[1]]
                for inner, line in inherited.items():
                    lines.setdefault(inner, line)


def _key_problem(key: yaml.Node) -> str | None:
    """What keeps a node from being a key, or None."""
    if not isinstance(key, yaml.ScalarNode):
        return "a key must be a plain word"
    if key.tag == "tag:yaml.org,2002:str":
        return None
    kind = _written(key.tag).removeprefix("!!")
    return f"a key must be a word; {key.value[:60]!r} is read as {kind}: put it in quotes if it is meant as a word"


def _written(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
