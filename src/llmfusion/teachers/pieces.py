"""A teacher cache in the making: pieces, each the rows of a fixed number of consecutive samples of the mix, and how they become one cache.

A piece is the unit that survives a kill. It is ``piece-NNNNN.safetensors`` and a note beside it, ``piece-NNNNN.json``, written last: the rows'
hash, the piece's part of the index, and its sums for what is told of the whole. What a piece holds follows from the mix alone, so that it does not
matter how many jobs made the pieces, or how often they were killed.
"""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfusion.artifacts import require, sha256_file, sync, write_file
from llmfusion.data.sources import Rejected
from llmfusion.digests import canonical
from llmfusion.teachers.layout import HEAD, PIECE, piece_name

NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # another file system, or one without links


@dataclass(frozen=True)
class Shard:
    """One of several jobs that make a cache: every ``count``-th piece, beginning with number ``index``."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, spec: dict[str, Any]) -> "Shard":
        """From a spec's ``shard: [number from 1, count]``; all pieces where there is none."""
        index, count = spec.get("shard", (1, 1))
        return cls(index - 1, count)

    def pieces(self, samples: int, kind: str) -> range:
        """Numbers of its pieces of a mix with so many samples; none where there are more shards than pieces."""
        return range(self.index, count_of(samples, kind), self.count)


def count_of(samples: int, kind: str) -> int:
    """Pieces of a mix."""
    return -(-samples // PIECE[kind])


class Store:
    """Finished pieces in a folder, each with its note; those of another spec or other inputs (``key``) do not count."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.tmp"):  # of a job that was killed
            left.unlink()

    def tidy(self) -> None:
        """Remove what does not belong here, of any number: a capture of a longer mix, or in smaller pieces, left more of them."""
        others = sorted(set(self.folder.iterdir()) - set(self._mine()))
        if others:
            told = ", ".join(path.name for path in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            print(f"{self.folder}: not finished, or of another spec or other inputs, and removed: {told}", flush=True)
        for path in reversed(others):  # a piece, then its note
            path.unlink()

    def _mine(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if _told(note_of(path)).get("key") == self.key]

    def has(self, name: str) -> bool:
        """Whether a piece was finished, and its bytes are still those that were written."""
        path, note = self.folder / name, note_of(self.folder / name)
        told = _told(note)
        if told.get("key") != self.key:
            return False
        if told["sha256"] is None or (path.exists() and sha256_file(path) == told["sha256"]):
            return True
        print(f"{path} is missing or damaged; it is made again", flush=True)
        for file in (note, path):
            file.unlink(missing_ok=True)
        return False

    def put(self, name: str, tensors: dict[str, Any], note: dict[str, Any]) -> None:
        """Write a piece, then its note; without tensors there is only the note."""
        from safetensors.torch import save_file

        path, found = self.folder / name, None
        if tensors:
            temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
            try:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
                temporary.chmod(0o644)
                sync(temporary)
                found = sha256_file(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)  # half a piece on a full disk would keep it full
        write_file(note_of(path), canonical({"key": self.key, "sha256": found, **note}).encode())

    def size(self) -> int:
        """Bytes of what lies there and counts."""
        return sum(path.stat().st_size for path in self._mine())


def _told(note: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none, or not a whole one."""
    try:
        told = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def note_of(path: Path) -> Path:
    """The note of a piece."""
    return path.with_suffix(".json")


def link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the two lie on different file systems, or on one that has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)


def hand_over(store: Path, folder: Path) -> list[dict[str, Any]]:
    """Everything a shard made into its artifact's folder, notes included; the store is tidy. Returns the notes of its pieces."""
    for path in sorted(store.iterdir()):
        link(path, folder / path.name)
    return [json.loads(path.read_bytes()) for path in sorted(store.glob("piece-*.json"))]


def gather(folders: Sequence[Path], folder: Path, samples: int, kind: str) -> dict[str, Any]:
    """Join the pieces in ``folders`` to a cache in ``folder``: files by a second name, the index, and facts about all rows.

    The result does not depend on which folder a piece was in. Raises :class:`~llmfusion.errors.UserError` for a piece that is missing or there twice.
    """
    notes: dict[int, dict[str, Any]] = {}
    total = count_of(samples, kind)
    for place in folders:
        for note in sorted(place.glob("piece-*.json")):
            number = int(note.stem.split("-")[1])
            require(number not in notes and number < total, f"{note}: a piece too many: {total} were expected, each once; remove the folder and run again")
            notes[number] = json.loads(note.read_bytes())
            if notes[number]["sha256"] is not None:
                link(place / piece_name(number), folder / piece_name(number))
    lacking = [number for number in range(total) if number not in notes]
    require(
        not lacking, f"{folders[0].parent}: {len(lacking)} of {total} pieces are missing, the first is number {min(lacking, default=0)}; make its shard again"
    )
    heads = [place / HEAD for place in folders if (place / HEAD).exists()]
    require(len(heads) == 1, f"{folders[0].parent}: {HEAD} lies in {len(heads)} folders, expected one; make the shards again")
    link(heads[0], folder / HEAD)
    known = json.loads(note_of(heads[0]).read_bytes())["known"]
    return {"rows_of_head": known, **_joined([notes[number] for number in range(total)], folder)}


def _joined(notes: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write the index; facts about all rows from the pieces' sums, added in the pieces' order."""
    import pyarrow
    import pyarrow.parquet

    index = [{**row, "piece": number} for number, note in enumerate(notes) for row in note["index"]]
    rejected = Rejected()
    for reason, name in (entry for note in notes for entry in note["rejected"]):
        rejected.add(reason, name)
    require(bool(index), f"no sample of the mix fits this teacher; rejected: {dict(rejected.counts)}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(index), folder / "index.parquet")
    rows = sum(row["length"] for row in index)
    facts = {"samples": len(index), "rows": rows, "rejected": rejected.facts(), "logprob_gap": max(note["gap"] for note in notes)}
    facts |= {f"std_{name}": _std([note["moments"][name] for note in notes]) for name in notes[0]["moments"]}
    return facts | {name: sum(note["sums"][name] for note in notes) / rows for name in notes[0]["sums"]}


def _std(moments: list[list[float]]) -> float:
    """Standard deviation from counts, sums and sums of squares."""
    count, total, squares = (sum(column) for column in zip(*moments, strict=True))
    mean = total / count
    return max(squares / count - mean * mean, 0.0) ** 0.5
