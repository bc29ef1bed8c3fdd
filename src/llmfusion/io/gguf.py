"""Headers of GGUF files without numpy: what a model is, and how many values its tensors hold."""

import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_DIMENSIONS = 4


def read_gguf_header(file: Path) -> tuple[dict[str, Any], int]:
    """Metadata of a GGUF file, and the number of values in its tensors.

    Of a list (tokens, merges) the metadata hold its length. Raises :class:`DamagedError` for a file that is no GGUF or
    whose header is damaged, ``OSError`` where it cannot be read. Time and memory are bounded by the file's size.
    """
    with open(file, "rb") as handle:
        try:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DamagedError(f"{file}: is empty, expected a GGUF file") from None
        with content:
            try:
                return _parse(content)
            except (struct.error, ValueError, KeyError, UnicodeDecodeError, OverflowError) as error:
                raise DamagedError(f"{file}: no GGUF header that can be read: {error}") from None


def _parse(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    cursor = _Cursor(content)
    magic, version = content[:4], struct.unpack_from("<I", content, 4)[0]
    if magic != MAGIC or version not in VERSIONS:
        raise ValueError(f"begins with {magic!r} and version {version}; expected {MAGIC!r} and version 2 or 3")
    cursor.at = 8
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in cursor.repeat(entries, 12):  # a key's length and a type
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata, sum(_tensor_values(cursor) for _ in cursor.repeat(tensors, 24))


def _tensor_values(cursor: "_Cursor") -> int:
    """Values of the tensor that is described next: name, shape, type, offset."""
    cursor.string()
    dimensions = cursor.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = [cursor.number("Q") for _ in range(dimensions)]
    cursor.at += 12  # type and offset
    return prod(shape)


class _Cursor:
    """A place in a GGUF file's header, moved on by everything that is read."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.at = 0

    def repeat(self, count: int, least: int) -> Iterator[int]:
        """``count`` times, if so many entries of at least ``least`` bytes can follow."""
        if count * least > len(self.content) - self.at:
            raise ValueError(f"{count} entries are announced, the file is too short for them")
        return iter(range(count))

    def number(self, code: str) -> Any:
        """A number of this :mod:`struct` code."""
        value = struct.unpack_from(f"<{code}", self.content, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        """A string with its length before it."""
        return self._bytes(self.number("Q")).decode()

    def _bytes(self, length: int) -> bytes:
        start = self.at
        self._skip(length)
        return self.content[start : self.at]

    def _skip(self, length: int) -> None:
        if length > len(self.content) - self.at:
            raise ValueError(f"{length} bytes are announced, {len(self.content) - self.at} follow")
        self.at += length

    def value(self, kind: int) -> Any:
        """A value of this type; of a list its length."""
        if kind == STRING:
            return self.string()
        return self._list_length() if kind == ARRAY else self.number(NUMBERS[kind])

    def _list_length(self) -> int:
        """Step over a list. Lists of lists are not part of what llama.cpp writes."""
        kind, count = self.number("I"), int(self.number("Q"))
        if kind == STRING:
            for _ in self.repeat(count, 8):
                self._skip(self.number("Q"))
        else:
            self._skip(count * struct.calcsize(f"<{NUMBERS[kind]}"))
        return count
