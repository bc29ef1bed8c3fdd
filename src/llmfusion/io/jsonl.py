"""JSON lines: reading without loading everything, random access, and one way to write them.

What a row means is the caller's.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError

Row = dict[str, Any]
Check = Callable[[Row, int], str | None]  # (row, number of its line from 0) -> what is wrong with it


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines (ASCII, sorted keys). Returns how many."""
    count = 0
    with open(path, "w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, check: Check | None = None) -> Iterator[Row]:
    """The rows of a file, one by one.

    Raises :class:`DamagedError` naming the file and the first line that cannot be used.

    A line must hold a JSON object in UTF-8 without NaN or Infinity, and satisfy ``check``.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            yield _parse(path, number, line, check)


class LineIndex:
    """Random access to the lines of a JSON-lines file: 8 bytes of memory a line, whatever its length."""

    def __init__(self, path: Path, check: Check | None = None):
        self.path = path
        self.check = check
        self.starts: list[int] = []
        position = 0
        with open(path, "rb") as file:
            for line in file:
                self.starts.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, order: Iterable[int]) -> Iterator[tuple[int, Row]]:
        """``(line number, row)`` in the given order; errors as in :func:`read_jsonl`."""
        with open(self.path, "rb") as file:
            for number in order:
                file.seek(self.starts[number])
                yield number, _parse(self.path, number, file.readline(), self.check)


def _parse(path: Path, number: int, line: bytes, check: Check | None) -> Row:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        problem = None if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"
    except ValueError as error:
        problem = f"expected a JSON object in UTF-8: {error}"
    except RecursionError:
        problem = "nested too deeply"
    if problem is None and check is not None:
        problem = check(row, number)
    if problem is not None:
        raise DamagedError(f"{path}, line {number + 1}: {problem}")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
