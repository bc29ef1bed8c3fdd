"""What a merge has finished, so that one that was killed goes on with the next tensor.

Every line ends with a checksum over itself and the line before it: what follows a line that was damaged, moved or taken
from another journal is not believed, and those tensors are merged again.
"""

import json
from pathlib import Path
from typing import Any, TypedDict

from llmfusion.errors import DamagedError
from llmfusion.io.digests import digest
from llmfusion.io.files import JSON_LIMIT, read_regular, write_file


class FinishedTensor(TypedDict):
    """A tensor that was written: the checksum of its bytes, and its row of the report (None for one that is copied)."""

    xxh3: str
    row: dict[str, Any] | None


class Journal:
    """Which tensors are finished: a line each, behind one with the key of the merge they belong to."""

    def __init__(self, path: Path, key: str):
        self.path = path
        self.key = key
        self._last = ""  # checksum of the last line that was written

    def read(self) -> dict[str, FinishedTensor]:
        """Finished tensors by name, up to the first line that is not as it was written.

        Empty where there is no journal of this merge.
        """
        finished: dict[str, FinishedTensor] = {}
        last = self._checksum("", {"key": self.key})
        for number, line in enumerate(self._lines()):
            try:
                entry = json.loads(line)
                checksum = entry.pop("checksum")
                body = {"key": self.key} if number == 0 else {"tensor": entry["tensor"], "done": entry["done"]}
                expected = last if number == 0 else self._checksum(last, body)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # it may be half written
                break
            if entry != body or checksum != expected:
                break
            last = checksum
            if number:
                finished[entry["tensor"]] = entry["done"]
        return finished

    def start(self, finished: dict[str, FinishedTensor]) -> None:
        """Begin the journal with what is known to be finished."""
        self._last = ""
        lines = [self._line({"key": self.key})]
        lines += [self._line({"tensor": name, "done": tensor}) for name, tensor in finished.items()]
        write_file(self.path, "".join(lines).encode())  # at once: a kill here must not lose what is known

    def add(self, name: str, tensor: FinishedTensor) -> None:
        """Record one more tensor."""
        with open(self.path, "a") as file:
            file.write(self._line({"tensor": name, "done": tensor}))

    def _lines(self) -> list[bytes]:
        try:
            return read_regular(self.path, limit=JSON_LIMIT).splitlines()
        except (OSError, DamagedError):
            return []

    def _line(self, entry: dict[str, Any]) -> str:
        self._last = self._checksum(self._last, entry)
        return json.dumps({**entry, "checksum": self._last}) + "\n"

    @staticmethod
    def _checksum(last: str, entry: dict[str, Any]) -> str:
        """sha256 of a line's content and of the checksum of the line before it."""
        return digest(last, json.dumps(entry, sort_keys=True))  # a row may hold an infinity
