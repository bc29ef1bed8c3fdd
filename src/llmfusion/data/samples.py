"""Samples, test items and stored answers: what a row of each must hold, and stable ids.

A sample is ``{"id", "dataset", "domain", "messages": [{"role", "content"}, ...]}`` ending with the assistant, or the
same with ``"text"`` instead of messages (raw text: every token is a label). A test item is numbered by ``item`` and
holds the fields of its layout, nothing null. A stored answer is ``{"item", "prompt", "answer"}``.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmfusion.io import jsonl
from llmfusion.io.jsonl import Row

Sample = dict[str, Any]


def sample_id(origin: str, row: int, sample: Sample) -> str:
    """Stable id: hash of where a sample comes from (dataset and revision), its row and its text."""
    body = json.dumps(sample.get("messages", sample.get("text")), ensure_ascii=True)
    return hashlib.sha1(f"{origin}\n{row}\n{body}".encode()).hexdigest()


def text_of(sample: Sample) -> str:
    """All text of a sample, messages joined by newlines."""
    return sample["text"] if "text" in sample else "\n".join(m["content"] for m in sample["messages"])


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a dataset or a mix. Raises :class:`DamagedError` naming the first line that is none."""
    return jsonl.read_jsonl(path, check_sample)


def read_items(path: Path) -> Iterator[Row]:
    """Items, or few-shot examples, of a task.

    Raises :class:`DamagedError` naming file and line of the first row that is none.
    """
    return jsonl.read_jsonl(path, check_item)


def read_answers(path: Path) -> Iterator[Row]:
    """Stored answers to a task. Raises :class:`DamagedError` naming file and line of the first row that is none."""
    return jsonl.read_jsonl(path, check_answer)


def check_sample(row: Row, number: int) -> str | None:
    """What keeps a row from being a sample, or None."""
    problems = [_not_text(row, key) for key in ("id", *(key for key in ("domain", "text") if key in row))]
    if "text" not in row:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return f"expected text or a list of messages, found {messages!r:.60}"
        problems += [_not_text(message, key) for message in messages for key in ("role", "content")]
        if messages[-1].get("role") != "assistant":
            problems.append("expected the last message to be the assistant's")
    return next((problem for problem in problems if problem), None)


def check_dataset_sample(row: Row, number: int) -> str | None:
    """The same for a sample of a dataset, which a mix also asks for its domain."""
    return check_sample(row, number) or _not_text(row, "domain")


def check_item(row: Row, number: int) -> str | None:
    """What keeps a row from being the test item (or the few-shot example) of its line, or None."""
    if row.get("item") != number:
        return f"expected item {number}, found {row.get('item')!r}"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "expected text, found half a surrogate pair"
    return next((f"{key}: expected a value, found null" for key, value in row.items() if value is None), None)


def check_answer(row: Row, number: int) -> str | None:
    """What keeps a row from being the stored answer to the item of its line, or None."""
    return check_item(row, number) or _not_text(row, "prompt") or _not_text(row, "answer")


def _not_text(row: Row, key: str) -> str | None:
    value = row.get(key)
    if not isinstance(value, str):
        return f"{key}: expected text, found {value!r:.60}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{key}: expected text, found half a surrogate pair"
    return None
