"""YAML as people expect it: 1.2 numbers and booleans, no duplicate keys, and a line number for every key.

PyYAML follows YAML 1.1, where ``1e-6`` is a string, ``no`` is false and ``1:30`` is 90, and it keeps the last of two
equal keys without a word. A study must not be able to change its meaning that way.
"""

import re
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
MAX_NODES = 200_000  # the paper's study has some hundreds


class YamlError(Exception):
    """The file cannot be read as YAML. ``problems`` holds ``(line, message)`` pairs, lines counted from 1."""

    def __init__(self, problems: list[tuple[int, str]]):
        super().__init__("; ".join(f"line {line}: {text}" for line, text in problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    pass


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
    return int(loader.construct_scalar(node))  # YAML 1.2: 010 is ten, 1_000 and 1:30 are strings


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load(path: str | Path) -> tuple[Any, dict[KeyPath, int]]:
    """Read one YAML document.

    Returns the data and, for every mapping key and list item, its line (from 1) under its path, e.g.
    ``("datasets", "orca", "rows")``. Raises :class:`YamlError` for bad syntax, a second equal key, bytes that are not
    UTF-8, or anchors that multiply without end, and ``OSError`` if the file cannot be opened.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise YamlError([(1, f"not UTF-8: byte {error.start} is {error.object[error.start]:#x}")]) from None
    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError([(mark.line + 1 if mark else 1, error.problem or str(error))]) from None
    except UNREADABLE as error:
        raise YamlError([(1, (str(error).splitlines() or [type(error).__name__])[0])]) from None


# what PyYAML raises for text that it cannot read; the last two for "!!bool x"
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)


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
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append((line, "a key must be a plain word"))
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
