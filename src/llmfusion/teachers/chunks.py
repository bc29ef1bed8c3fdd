"""A teacher cache in the making: pieces, each the rows of a fixed number of consecutive samples of the mix, and how they become one cache.

A piece is the unit that survives a kill. It is ``piece-NNNNN.safetensors`` and a note beside it, ``piece-NNNNN.json``, written last: the rows'
hash, the piece's part of the index, and its sums for what is told of the whole. What a piece holds follows from the mix alone, so that it does not
matter how many jobs made the pieces, or how often they were killed.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfusion.artifacts.resume import note_path
from llmfusion.data.sources import Rejected
from llmfusion.errors import require
from llmfusion.io.files import link_or_copy
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, HEAD, chunk_file_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One of several jobs that make a cache: every ``count``-th piece, beginning with number ``index``."""

    index: int = 0
    count: int = 1

    def chunks(self, samples: int, kind: str) -> range:
        """Numbers of its pieces of a mix with so many samples; none where there are more shards than pieces."""
        return range(self.index, chunk_count(samples, kind), self.count)


def chunk_count(samples: int, kind: str) -> int:
    """Pieces of a mix."""
    return -(-samples // CHUNK_SAMPLES[kind])


def hand_over(store: Path, folder: Path) -> list[dict[str, Any]]:
    """Everything a shard made into its artifact's folder, notes included; the store is tidy. Returns the notes of its pieces."""
    for path in sorted(store.iterdir()):
        link_or_copy(path, folder / path.name)
    return [json.loads(path.read_bytes()) for path in sorted(store.glob("piece-*.json"))]


def assemble(folders: Sequence[Path], folder: Path, samples: int, kind: str) -> dict[str, Any]:
    """Join the pieces in ``folders`` to a cache in ``folder``: files by a second name, the index, and facts about all rows.

    The result does not depend on which folder a piece was in. Raises :class:`~llmfusion.errors.UserError` for a piece that is missing or there twice.
    """
    notes: dict[int, dict[str, Any]] = {}
    total = chunk_count(samples, kind)
    for place in folders:
        for note in sorted(place.glob("piece-*.json")):
            number = int(note.stem.split("-")[1])
            require(
                number not in notes and number < total,
                f"{note}: a piece too many: {total} were expected, each once; remove the folder and run again",
            )
            notes[number] = json.loads(note.read_bytes())
            if notes[number]["sha256"] is not None:
                link_or_copy(place / chunk_file_name(number), folder / chunk_file_name(number))
    lacking = [number for number in range(total) if number not in notes]
    require(
        not lacking,
        f"{folders[0].parent}: {len(lacking)} of {total} pieces are missing, the first is number {min(lacking, default=0)}; make its shard again",
    )
    heads = [place / HEAD for place in folders if (place / HEAD).exists()]
    require(
        len(heads) == 1,
        f"{folders[0].parent}: {HEAD} lies in {len(heads)} folders, expected one; make the shards again",
    )
    link_or_copy(heads[0], folder / HEAD)
    known = json.loads(note_path(heads[0]).read_bytes())["known"]
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
    facts = {
        "samples": len(index),
        "rows": rows,
        "rejected": rejected.facts(),
        "logprob_gap": max(note["gap"] for note in notes),
    }
    facts |= {f"std_{name}": _std([note["moments"][name] for note in notes]) for name in notes[0]["moments"]}
    return facts | {name: sum(note["sums"][name] for note in notes) / rows for name in notes[0]["sums"]}


def _std(moments: list[list[float]]) -> float:
    """Standard deviation from counts, sums and sums of squares."""
    count, total, squares = (sum(column) for column in zip(*moments, strict=True))
    mean = total / count
    return max(squares / count - mean * mean, 0.0) ** 0.5
