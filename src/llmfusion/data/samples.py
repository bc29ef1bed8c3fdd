"""Samples and items as JSON lines: reading without loading everything, and stable ids.

A sample is ``{"id", "dataset", "domain", "messages": [{"role", "content"}, ...]}`` ending with the assistant, or the same
with ``"text"`` instead of messages (raw text: every token is a label). Readers check every line of ``samples.jsonl``, of a
task's ``items.jsonl`` and ``shots.jsonl`` (numbered by ``item``, nothing null) and of stored answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError

Sample = dict[str, Any]
Check = Callable[[dict[str, Any], int], str | None]  # what is wrong with the row of a line, counted from 0


def sample_id(origin: str, row: int, sample: Sample) -> str:
    """Stable id: hash of where a sample comes from (dataset and revision), its row and its text."""
    body = json.dumps(sample.get("messages", sample.get("text")), ensure_ascii=True)
    return hashlib.sha1(f"{origin}\n{row}\n{body}".encode()).hexdigest()


def text_of(sample: Sample) -> str:
    """All text of a sample, messages joined by newlines."""
    return sample["text"] if "text" in sample else "\n".join(m["content"] for m in sample["messages"])


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON lines (ASCII, sorted keys). Returns how many."""
    count = 0
    with open(path, "w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, check: Check | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises :class:`DamagedError` naming the file and the line that cannot be used.

    What a row must hold follows from the file's name (``samples.jsonl``, ...), or is what ``check`` says.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            yield _row(path, number, line, check or CHECKS.get(path.name))


def _row(path: Path, number: int, line: bytes, check: Check | None) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        wrong = None if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"
    except ValueError as error:
        wrong = f"expected a JSON object in UTF-8: {error}"
    if wrong is None and check is not None:
        wrong = check(row, number)
    if wrong is not None:
        raise DamagedError(f"{path}, line {number + 1}: {wrong}")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def wrong_sample(row: dict[str, Any], number: int) -> str | None:
    """What keeps a row from being a sample, or None."""
    wrong = [_not_text(row, key) for key in ("id", *(key for key in ("domain", "text") if key in row))]
    if "text" not in row:
        turns = row.get("messages")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            return f"expected text or a list of messages, found {turns!r:.60}"
        wrong += [_not_text(turn, key) for turn in turns for key in ("role", "content")]
        wrong += [] if turns[-1].get("role") == "assistant" else ["expected the last message to be the assistant's"]
    return next((w for w in wrong if w), None)


def wrong_staged(row: dict[str, Any], number: int) -> str | None:
    """The same for a sample of a dataset, which a mix also asks for its domain."""
    return wrong_sample(row, number) or _not_text(row, "domain")


def wrong_item(row: dict[str, Any], number: int) -> str | None:
    """What keeps a row from being a test item (or a few-shot example) of its line, or None."""
    if row.get("item") != number:
        return f"expected item {number}, found {row.get('item')!r}"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "expected text, found half a surrogate pair"
    return next((f"{key}: expected a value, found null" for key, value in row.items() if value is None), None)


def wrong_answer(row: dict[str, Any], number: int) -> str | None:
    """What keeps a row from being the stored answer to the item of its line, or None."""
    return wrong_item(row, number) or _not_text(row, "prompt") or _not_text(row, "answer")


def _not_text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if not isinstance(value, str):
        return f"{key}: expected text, found {value!r:.60}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{key}: expected text, found half a surrogate pair"
    return None


CHECKS: dict[str, Check] = {"samples.jsonl": wrong_sample, "items.jsonl": wrong_item, "shots.jsonl": wrong_item}


class LineIndex:
    """Random access to the lines of a JSON-lines file: 8 bytes of memory a line, whatever its length."""

    def __init__(self, path: Path):
        self.path = path
        self.starts: list[int] = []
        at = 0
        with open(path, "rb") as file:
            for line in file:
                self.starts.append(at)
                at += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, order: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """``(line number, row)`` in the given order."""
        with open(self.path, "rb") as file:
            for number in order:
                file.seek(self.starts[number])
                yield (
                    number,
                    _row(
                        self.path, number, file.readline(), wrong_staged if self.path.name == "samples.jsonl" else None
                    ),
                )
