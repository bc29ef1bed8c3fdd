"""Rows from where a study says: the hub at a pinned commit, a file, or the generated worlds."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.data import worlds
from llmfusion.errors import UserError

Row = dict[str, Any]


def rows(source: Row) -> Iterator[Row]:
    """All rows of a ``hub`` or ``path`` source, as plain dictionaries."""
    return _hub(source) if source["kind"] == "hub" else _file(ROOT / source["path"])


def generated(source: Row) -> Iterator[Row]:
    """Rows of a ``generated`` source: samples, or items if its form is ``test``."""
    return worlds.draw(source["generator"], source["form"], source["rows"], source.get("seed", 42), source.get("wrong", 0.0))


def origin(source: Row) -> str:
    """What identifies the data behind a source, for sample ids: repository and commit, file content, or the world and its seed."""
    if source["kind"] == "hub":
        return f"{source['repo']}@{source['revision']}/{source.get('subset')}/{source.get('split', 'train')}/{source.get('files')}"
    if source["kind"] == "path":
        with open(ROOT / source["path"], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(source, sort_keys=True)


def _hub(source: Row) -> Iterator[Row]:
    import datasets

    subset = source.get("subset")
    names = subset if isinstance(subset, list) else [subset]
    try:
        tables = [
            datasets.load_dataset(source["repo"], name, split=source.get("split", "train"), revision=source["revision"], data_files=source.get("files"))
            for name in names
        ]
    except Exception as error:  # the hub's client raises dozens of kinds; the user needs its words and the way out
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source['repo']} at {source['revision'][:12]}: could not be loaded: {told}. Is this machine online, the licence accepted "
            "on the hub and HF_TOKEN set? Offline, download it elsewhere and use kind: path"
        ) from error
    for table in tables:
        yield from table


def _file(path: Path) -> Iterator[Row]:
    if not path.exists():
        raise UserError(f"{path}: is not there")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        return
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a file of samples is .jsonl or .parquet")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


class _MissingColumnError(KeyError):
    pass


class _Columns(dict):
    """A row whose own missing columns are told apart from keys missing somewhere inside it."""

    def __missing__(self, column: str) -> Any:
        raise _MissingColumnError(column)


def apply_layout(name: str, convert: Callable[[Row], Row | None], row: Row, number: int) -> Row | None:
    """Convert one row; a column that is not there stops everything with the list of those that are."""
    try:
        return convert(_Columns(row))
    except _MissingColumnError as error:
        raise UserError(f"{name}, row {number}: layout needs column {error}; there are: {', '.join(map(str, row))}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


class Rejected:
    """Rows left out, by reason, with the first few of each named."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        self.counts[reason] += 1
        if len(self.first.setdefault(reason, [])) < 5:
            self.first[reason].append(str(name))

    def facts(self) -> dict[str, Any]:
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in sorted(self.counts.items())}
