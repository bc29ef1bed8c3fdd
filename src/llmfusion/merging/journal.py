"""What a merge has finished, so that one that was killed goes on with the next tensor."""

import contextlib
import json
from pathlib import Path
from typing import Any, TypedDict


class FinishedTensor(TypedDict):
    """A tensor that was written: the checksum of its bytes, and its row of the report (None for one that is copied)."""

    xxh3: str
    row: dict[str, Any] | None


class Journal:
    """Which tensors are finished: a line each, behind one with the key of the merge they belong to."""

    def __init__(self, path: Path, key: str):
        self.path = path
        self.key = key

    def read(self) -> dict[str, FinishedTensor]:
        """Finished tensors by name; empty where there is no journal of this merge."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        finished: dict[str, FinishedTensor] = {}
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # the last line may be half written
            if json.loads(lines[0])["key"] != self.key:
                return {}
            for line in lines[1:]:
                entry = json.loads(line)
                finished[entry["tensor"]] = entry["done"]
        return finished

    def start(self, finished: dict[str, FinishedTensor]) -> None:
        """Begin the journal with what is known to be finished."""
        with open(self.path, "w") as file:
            file.write(json.dumps({"key": self.key}) + "\n")
            file.writelines(self._line(name, tensor) for name, tensor in finished.items())

    def add(self, name: str, tensor: FinishedTensor) -> None:
        """Record one more tensor."""
        with open(self.path, "a") as file:
            file.write(self._line(name, tensor))

    @staticmethod
    def _line(name: str, tensor: FinishedTensor) -> str:
        return json.dumps({"tensor": name, "done": tensor}) + "\n"
