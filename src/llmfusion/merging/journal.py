"""What a merge has finished, so that one that was killed goes on with the next tensor."""

import contextlib
import json
from pathlib import Path
from typing import Any

Done = dict[str, Any]  # checksum of a tensor's bytes, and its row of the report (None for one that is copied)


class Journal:
    """Which tensors are finished: a line each, behind one with the key of the merge they belong to."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[str, Done]:
        """Finished tensors by name; empty where there is no journal of this merge."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        found: dict[str, Done] = {}
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # the last line may be half written
            if json.loads(lines[0])["key"] != self.key:
                return {}
            for line in lines[1:]:
                entry = json.loads(line)
                found[entry["tensor"]] = entry["done"]
        return found

    def start(self, done: dict[str, Done]) -> None:
        """Begin the journal with what is known to be finished."""
        with open(self.path, "w") as file:
            file.write(json.dumps({"key": self.key}) + "\n")
            file.writelines(self._line(name, entry) for name, entry in done.items())

    def add(self, name: str, done: Done) -> None:
        with open(self.path, "a") as file:
            file.write(self._line(name, done))

    @staticmethod
    def _line(name: str, done: Done) -> str:
        return json.dumps({"tensor": name, "done": done}) + "\n"
