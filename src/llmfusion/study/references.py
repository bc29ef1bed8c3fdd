"""What one section of a study says about another: names that must exist, no cycles, no source twice.

Each kind checks its own sections (:data:`llmfusion.study.kinds.Kind.problems`) with the help of :class:`Declared`; what
concerns several kinds at once is checked here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmfusion.study.addresses import files_beside_others
from llmfusion.study.data_plugins import layouts
from llmfusion.study.errors import Key, Problem, nearest
from llmfusion.study.kinds import all_kinds
from llmfusion.study.schema.base import started_from

MODEL_KINDS = ("base", "trained", "merged")
LONGEST_CHAIN = 100  # models that start from one another; the graph follows them by recursion


class Declared:
    """Names the file declares (``raw``), also of faulty entries, and the entries that are valid on their own."""

    def __init__(self, raw: dict[str, Any], valid: dict[Key, Any]):
        self.valid = valid
        self.datasets, self.mixes, self.tasks, self.batches = (
            _names(raw.get(s)) for s in ("datasets", "mixes", "tasks", "batches")
        )
        capture = raw.get("capture")
        self.capture: dict[str, Any] = capture if isinstance(capture, dict) else {}
        models = raw.get("models")
        models = models if isinstance(models, dict) else {}
        self.models = {f"{kind}/{name}" for kind in MODEL_KINDS for name in _names(models.get(kind))}

    def entries(self, *section: str) -> Iterator[tuple[Key, Any]]:
        """Keys and valid entries of a section, e.g. ``entries("models", "trained")``."""
        for key, entry in self.valid.items():
            if key[: len(section)] == section:
                yield key, entry

    def model(self, address: str) -> Any:
        """The valid entry of a model, or None."""
        kind, name = address.split("/")
        return self.valid.get(("models", kind, name))

    def vocabulary(self, address: str) -> str | None:
        """An identifier that models with one vocabulary share; None where an entry on the way to it is not valid."""
        seen: set[str] = set()
        while (entry := self.model(address)) is not None and address not in seen:
            seen.add(address)
            before = started_from(entry)
            if before is None:
                return str(getattr(entry, "vocabulary", address))
            address = before
        return None

    def missing(self, key: Key, name: str, names: set[str], what: str) -> Iterator[Problem]:
        """A problem if ``name`` is not declared."""
        if name not in names:
            yield Problem(key, f"there is no {what} {name!r}; {nearest(name, names)}")

    def repeated(self, key: Key, values: list[str], what: str) -> Iterator[Problem]:
        """A problem for each value that is listed before."""
        for i, value in enumerate(values):
            if value in values[:i]:
                yield Problem((*key, i), f"{what} {value!r} stands here twice")

    def addresses(self, key: Key, values: list[str]) -> Iterator[Problem]:
        """A problem for each address of a model that is not declared."""
        for i, address in enumerate(values):
            yield from self.missing((*key, i), address, self.models, "model")

    def layout(self, key: Key, source: Any, makes: str) -> Iterator[Problem]:
        """The layout makes what the section holds, a "sample" or an "item"; it has columns where it needs them."""
        name = getattr(source, "layout", None)
        if name is None:
            return
        allowed = layouts(makes)
        if name not in allowed:
            yield Problem((*key, "layout"), f"got {name!r}; allowed here: {', '.join(allowed)}")
        elif allowed[name].needs_columns and source.columns is None:
            yield Problem((*key, "columns"), f"is needed with layout {name}")
        elif source.columns is not None and not allowed[name].needs_columns:
            yield Problem((*key, "columns"), f"has no meaning with layout {name!r}")


def problems(declared: Declared) -> list[Problem]:
    """All mistakes between entries."""
    own = [problem for kind in all_kinds().values() for problem in kind.problems(declared)]
    return [*own, *_colliding_files(declared), *_cycles(declared)]


def _colliding_files(declared: Declared) -> Iterator[Problem]:
    """Tables, and cells of one model, whose files have one name: ``t.provenance`` beside ``t``."""
    for section, example, what in (("tables", "tables/{}", "table"), ("tasks", "scores/base/x/{}", "cell of a task")):
        owners: dict[str, str] = {}
        for key, _ in declared.entries(section):
            name = str(key[1])
            files = files_beside_others(example.format(name))
            if any(Path(file).name == "manifest.json" for file in files):
                yield Problem(key, f"{name!r} cannot be the name of a {what}: its file would be a manifest.json")
            taken = next((file for file in files if file in owners), None)
            if taken is not None:
                text = f"{name!r} and {owners[taken]!r} would both write {Path(taken).name}; rename one of them"
                yield Problem(key, text)
            owners |= dict.fromkeys(files, name)


def _names(section: Any) -> set[str]:
    return {str(k) for k in section} if isinstance(section, dict) else set()


def _cycles(declared: Declared) -> Iterator[Problem]:
    """Models that need themselves, and chains of models too long to be planned."""
    edges = {f"{key[1]}/{key[2]}": sorted(_uses(entry, declared)) for key, entry in declared.entries("models")}
    depth: dict[str, int] = {}  # of models whose needs have all been seen: the longest chain that ends in them
    for start in sorted(edges):
        yield from _depth_first(start, edges, depth)


def _uses(entry: Any, declared: Declared) -> set[str]:
    before = started_from(entry)
    out = {before} if before else set()
    for field in ("teachers", "generated", "parents"):
        out.update(getattr(entry, field, []))
    mix = declared.valid.get(("mixes", getattr(entry, "mix", "")))
    return out | set(mix.tokenizers if mix else [])


def _depth_first(start: str, edges: dict[str, list[str]], depth: dict[str, int]) -> Iterator[Problem]:
    """Visit all that ``start`` needs, without recursion: a study may hold more models than Python recurses."""
    path: dict[str, Iterator[str]] = {start: iter(edges.get(start, []))} if start not in depth else {}
    while path:
        node = next(reversed(path))
        other = next((other for other in path[node] if other not in depth), None)
        if other is None:
            path.popitem()
            depth[node] = 1 + max((depth.get(other, 0) for other in edges.get(node, [])), default=0)
            if depth[node] == LONGEST_CHAIN + 1:
                yield Problem(_key(node), f"is at the end of a chain of more than {LONGEST_CHAIN} models")
        elif other in path:
            names = list(path)
            yield Problem(_key(other), f"needs itself: {_arrows([*names[names.index(other) :], other])}")
        else:
            path[other] = iter(edges.get(other, []))


def _key(address: str) -> Key:
    kind, name = address.split("/")
    return ("models", kind, name)


def _arrows(names: list[str]) -> str:
    shown = names if len(names) <= 12 else [*names[:6], f"... ({len(names) - 8} more)", *names[-2:]]
    return " <- ".join(shown)
