"""Samples and items as JSON lines: reading without loading everything, and stable ids.

A sample is ``{"id", "dataset", "domain", "messages": [{"role", "content"}, ...]}`` ending with the assistant, or the same
with ``"text"`` instead of messages (raw text: every token is a label).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Sample = dict[str, Any]


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


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


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
                yield number, json.loads(file.readline())
