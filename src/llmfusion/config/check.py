"""What one section of a study says about another: names that must exist, no cycles, no source twice, merges that fit."""

from collections.abc import Iterator
from typing import Any, get_args

from llmfusion.config.data import SampleLayout, TaskLayout
from llmfusion.config.errors import Key, Problem, nearest
from llmfusion.config.models import ScratchModel, TrainedModel

COLUMNS = ("category", "label", "method", "models", "model", "scale", "average")


class Known:
    """Names the file declares (``raw``), also of entries that are faulty, and the entries that are sound."""

    def __init__(self, raw: dict, sound: dict[Key, Any]):
        self.sound = sound
        self.datasets, self.mixes, self.tasks, self.batches = (_names(raw.get(s)) for s in ("datasets", "mixes", "tasks", "batches"))
        capture = raw.get("capture")
        self.capture: dict = capture if isinstance(capture, dict) else {}
        models = raw.get("models")
        self.models = {f"{kind}/{name}" for kind in ("base", "trained", "merged") for name in _names(models.get(kind) if isinstance(models, dict) else None)}

    def entries(self, *section: str) -> Iterator[tuple[Key, Any]]:
        for key, entry in self.sound.items():
            if key[: len(section)] == section:
                yield key, entry

    def model(self, address: str) -> Any:
        kind, name = address.split("/")
        return self.sound.get(("models", kind, name))

    def vocabulary(self, address: str) -> str | None:
        """A word that is the same for models with one vocabulary; None where an entry on the way to it is missing or faulty."""
        seen: set[str] = set()
        while (entry := self.model(address)) is not None and address not in seen:
            seen.add(address)
            before = getattr(entry, "init", None) or getattr(entry, "pivot", None)
            if before is None:
                return str(getattr(entry, "vocabulary", address))
            address = before
        return None


def _names(section: Any) -> set[str]:
    return {str(k) for k in section} if isinstance(section, dict) else set()


def problems(known: Known) -> list[Problem]:
    """All mistakes between entries."""
    return [p for rule in (_data, _batches, _tables, _training, _fusions, _top, _merges, _cycles) for p in rule(known)]


def _missing(key: Key, name: str, names: set[str], what: str) -> Iterator[Problem]:
    if name not in names:
        yield Problem(key, f"there is no {what} {name!r}; {nearest(name, names)}")


def _repeated(key: Key, values: list[str], what: str) -> Iterator[Problem]:
    for i, value in enumerate(values):
        if value in values[:i]:
            yield Problem((*key, i), f"{what} {value!r} stands here twice")


def _addresses(key: Key, values: list[str], known: Known) -> Iterator[Problem]:
    for i, address in enumerate(values):
        yield from _missing((*key, i), address, known.models, "model")


def _data(known: Known) -> Iterator[Problem]:
    for key, mix in known.entries("mixes"):
        for name, count in mix.datasets.items():
            yield from _missing((*key, "datasets", name), name, known.datasets, "dataset")
            rows = getattr(known.sound.get(("datasets", name)), "rows", None)
            if rows is not None and rows < count:
                yield Problem((*key, "datasets", name), f"asks for {count} samples of a dataset with {rows} rows")
        for i, name in enumerate(mix.against):
            yield from _missing((*key, "against", i), name, known.tasks, "task")
        yield from _addresses((*key, "tokenizers"), mix.tokenizers, known)
    for key, dataset in known.entries("datasets"):
        if dataset.kind == "generated" and dataset.form == "test":
            yield Problem((*key, "form"), "test items cannot be trained on; use text or chat")
        yield from _layout(key, dataset, get_args(SampleLayout))
    for key, task in known.entries("tasks"):
        if key[1] in COLUMNS or str(key[1]).endswith(("_stderr", "_k", "_n")):
            yield Problem(key, "is the name of a column of every table; take another")
        if task.shots and task.shots_from is None:
            yield Problem((*key, "shots_from"), f"is missing: {task.shots} shots must come from somewhere")
        if task.items.kind == "generated" and task.items.form != "test":
            yield Problem((*key, "items", "form"), f"got {task.items.form!r}; a task's items need form: test")
        if task.shots_from is not None and task.shots_from.kind == "generated" and task.shots_from.form != "test":
            yield Problem((*key, "shots_from", "form"), f"got {task.shots_from.form!r}; examples of a task need form: test")
        yield from _layout((*key, "items"), task.items, get_args(TaskLayout))
        yield from _layout((*key, "shots_from"), task.shots_from, get_args(TaskLayout))


def _layout(key: Key, source: Any, allowed: tuple[str, ...]) -> Iterator[Problem]:
    """A dataset's rows become samples, a task's become items; ``pair`` needs its columns named."""
    layout = getattr(source, "layout", None)
    if layout is None:
        return
    if layout not in allowed:
        yield Problem((*key, "layout"), f"got {layout!r}; allowed here: {', '.join(allowed)}")
    elif (layout == "pair") != (source.columns is not None):
        yield Problem((*key, "columns"), "is needed with layout pair" if layout == "pair" else f"has no meaning with layout {layout!r}")


def _batches(known: Known) -> Iterator[Problem]:
    home: dict[str, str] = {}
    for key, batch in known.entries("batches"):
        yield from _repeated(key, batch, "task")
        for i, task in enumerate(batch):
            yield from _missing((*key, i), task, known.tasks, "task")
            if home.setdefault(task, str(key[1])) != key[1]:
                yield Problem((*key, i), f"task {task!r} is already in batch {home[task]!r}; a task is asked in one batch")
    for task in sorted(known.tasks - set(home)):
        yield Problem(("tasks", task), "is in no batch; add it under batches")


def _tables(known: Known) -> Iterator[Problem]:
    for key, table in known.entries("tables"):
        if key[1] == "cost":
            yield Problem(key, "is the name of the report of costs, results/cost.csv; take another")
        yield from _repeated((*key, "tasks"), table.tasks, "task")
        for i, task in enumerate(table.tasks):
            yield from _missing((*key, "tasks", i), task, known.tasks, "task")
        seen: set[str] = set()
        for i, row in enumerate(table.rows):
            for model in row.models:
                yield from _missing((*key, "rows", i, "model"), model, known.models, "model")
                if model in seen:
                    yield Problem((*key, "rows", i, "model"), f"model {model!r} has a row already")
                seen.add(model)
            if len(row.models) != len(table.rows[0].models):
                told = f"{len(row.models)} replicates, the first row {len(table.rows[0].models)}"
                yield Problem((*key, "rows", i, "model"), f"has {told}: rows of a table are compared replicate by replicate")
        if table.reference is not None and table.reference not in seen:
            yield Problem((*key, "reference"), f"{table.reference!r} has no row in this table; {nearest(table.reference, seen)}")


def _training(known: Known) -> Iterator[Problem]:
    for key, run in [*known.entries("models", "trained"), *known.entries("models", "base")]:
        if not isinstance(run, (TrainedModel, ScratchModel)):
            continue
        yield from _missing((*key, "mix"), run.mix, known.mixes, "mix")
        if run.init is not None:
            yield from _missing((*key, "init"), run.init, known.models, "model")
        if isinstance(run, ScratchModel) and run.init is not None and not run.init.startswith("base/"):
            yield Problem((*key, "init"), f"got {run.init!r}; a base model can start only from another base model")


def _fusions(known: Known) -> Iterator[Problem]:
    for key, run in known.entries("models", "trained"):
        for field in ("teachers", "generated"):
            sources = getattr(run, field)
            yield from _addresses((*key, field), sources, known)
            yield from _repeated((*key, field), sources, "source")
            for i, source in enumerate(sources):
                frozen_start = field == "teachers" and run.fusion is not None and run.fusion.target == "mince"  # FuseLLM lets the pivot compete
                if source == run.init and not frozen_start:
                    yield Problem((*key, field, i), f"{source!r} is the model this one starts from; a source must be another model")
        mix = known.sound.get(("mixes", run.mix))
        for i, teacher in enumerate(run.teachers):
            if mix is not None and teacher in known.models and teacher not in mix.tokenizers:
                text = f"mix {run.mix!r} does not name {teacher!r} under tokenizers: samples that do not fit the teacher would have no states"
                yield Problem((*key, "teachers", i), text)
        if run.generated and run.teachers:
            yield Problem((*key, "generated"), "cannot go with teachers: their caches hold the mix's own answers, not generated ones")
        if run.fusion is not None and run.fusion.target == "kd" and len(run.teachers) > 1:
            yield Problem((*key, "fusion", "target"), f"kd has one teacher, {len(run.teachers)} are given; use naive, mince or udf")
        if run.fusion is not None and run.fusion.target != "kd" and len(run.teachers) == 1:
            yield Problem((*key, "teachers"), f"{run.fusion.target} needs two teachers or more, one is given; use kd")


def _top(known: Known) -> Iterator[Problem]:
    """What the k most likely tokens of a teacher cannot serve."""
    if known.capture.get("kind") != "topk":
        return
    for key, run in known.entries("models", "trained"):
        if run.fusion is None:
            continue
        if run.fusion.target in ("udf", "minilogit"):
            why = "weighs teachers by their whole distributions" if run.fusion.target == "udf" else "compares the logits of all tokens"
            yield Problem((*key, "fusion", "target"), f"{run.fusion.target} {why}; capture.kind topk keeps the k most likely tokens. Use kind hidden or online")
        if run.fusion.temperature != 1:
            told = "the k most likely tokens of capture.kind topk are known at temperature 1 only. Use kind hidden or online"
            yield Problem((*key, "fusion", "temperature"), f"got {run.fusion.temperature}; {told}")
        mine = known.vocabulary(run.init)
        for i, teacher in enumerate(run.teachers):
            other = known.vocabulary(teacher) if teacher in known.models else None
            if mine is not None and other is not None and mine != other:
                told = f"{teacher!r} has another vocabulary than {run.init!r}: cross-model attention (DSKD) needs its states, which capture.kind topk does not keep"
                yield Problem((*key, "teachers", i), f"{told}. Use kind hidden or online")


def _merges(known: Known) -> Iterator[Problem]:
    for key, merge in known.entries("models", "merged"):
        yield from _missing((*key, "pivot"), merge.pivot, known.models, "model")
        yield from _addresses((*key, "parents"), merge.parents, known)
        yield from _repeated((*key, "parents"), merge.parents, "parent")
        for i, address in enumerate(merge.parents):
            yield from _parent((*key, "parents", i), address, merge.pivot, known)
        weight = getattr(merge, "weight", None)
        if isinstance(weight, list) and len(weight) != len(merge.parents):
            yield Problem((*key, "weight"), f"has {len(weight)} values for {len(merge.parents)} parents; give one value, or one each")


def _parent(key: Key, address: str, pivot: str, known: Known) -> Iterator[Problem]:
    parent = known.model(address)
    if address == pivot:
        yield Problem(key, f"{address!r} is the merge's pivot; its delta is zero")
    start = getattr(parent, "init", None) or getattr(parent, "pivot", None)
    if parent is not None and address != pivot and start != pivot:
        told = f"starts from {start!r}" if start else "was not trained from it"
        yield Problem(key, f"{address!r} {told}, the merge's pivot is {pivot!r}: deltas need the same start")
    if getattr(parent, "save_dtype", "float32") != "float32":
        yield Problem(key, f"{address!r} is saved in {parent.save_dtype}, which rounds its delta away; set its save_dtype: float32")


def _cycles(known: Known) -> Iterator[Problem]:
    edges = {f"{key[1]}/{key[2]}": sorted(_uses(entry, known)) for key, entry in known.entries("models")}
    done: set[str] = set()
    for start in sorted(edges):
        yield from _visit(start, edges, [], done)


def _uses(entry: Any, known: Known) -> set[str]:
    out = {a for a in (getattr(entry, "init", None), getattr(entry, "pivot", None)) if a}
    for field in ("teachers", "generated", "parents"):
        out.update(getattr(entry, field, []))
    mix = known.sound.get(("mixes", getattr(entry, "mix", "")))
    return out | set(mix.tokenizers if mix else [])


def _visit(node: str, edges: dict[str, list[str]], path: list[str], done: set[str]) -> Iterator[Problem]:
    if node in path:
        kind, name = node.split("/")
        yield Problem(("models", kind, name), "needs itself: " + " <- ".join([*path[path.index(node) :], node]))
    elif node not in done:
        for other in edges.get(node, []):
            yield from _visit(other, edges, [*path, node], done)
        done.add(node)
