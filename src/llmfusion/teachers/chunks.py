"""Chunks, each the rows of a fixed number of consecutive samples, and how they are assembled to a teacher cache.

A chunk is the unit that survives a kill. It is ``piece-NNNNN.safetensors`` and a note beside it, ``piece-NNNNN.json``,
written last: the rows' hash, the chunk's part of the index, and its sums for the statistics of the whole cache. The
mix alone decides what a chunk holds, so that the number of jobs that made the chunks and of times they were killed
does not matter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfusion.artifacts.resume import note_path
from llmfusion.data.rejections import Rejected
from llmfusion.errors import require
from llmfusion.io.files import link_or_copy, read_json_object
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, HEAD_FILE, INDEX_FILE, chunk_file_name

ChunkNote = dict[str, Any]  # key, name, sha256, index, moments, gap, sums, rejected; see capture.py
CHUNK_NOTES = "piece-*.json"


@dataclass(frozen=True)
class Shard:
    """One of several jobs that make a cache: every ``count``-th chunk, beginning with number ``index``."""

    index: int = 0
    count: int = 1

    def chunks(self, samples: int, kind: str) -> range:
        """Numbers of its chunks of a mix with so many samples; none where there are more shards than chunks."""
        return range(self.index, chunk_count(samples, kind), self.count)


def chunk_count(samples: int, kind: str) -> int:
    """Chunks of a mix."""
    return -(-samples // CHUNK_SAMPLES[kind])


def link_chunks(finished: Path, folder: Path) -> list[ChunkNote]:
    """Link all that a shard finished, notes included, into its artifact's folder. Returns the notes of its chunks."""
    for path in sorted(finished.iterdir()):
        link_or_copy(path, folder / path.name)
    return [json.loads(path.read_bytes()) for path in sorted(finished.glob(CHUNK_NOTES))]


def assemble(folders: Sequence[Path], folder: Path, samples: int, kind: str) -> dict[str, Any]:
    """Assemble the chunks in ``folders`` to a cache in ``folder``: hard links, the index, and facts about all rows.

    The result does not depend on which folder a chunk was in. Raises :class:`~llmfusion.errors.UserError` for a chunk
    that is missing or there twice.
    """
    notes = _collect_chunks(folders, folder, chunk_count(samples, kind))
    heads = [place / HEAD_FILE for place in folders if (place / HEAD_FILE).exists()]
    require(
        len(heads) == 1,
        f"{folders[0].parent}: {HEAD_FILE} lies in {len(heads)} folders, expected one; make the shards again",
    )
    link_or_copy(heads[0], folder / HEAD_FILE)
    head_rows = json.loads(note_path(heads[0]).read_bytes())["known"]
    return {"rows_of_head": head_rows, **_write_index(notes, folder)}


def _collect_chunks(folders: Sequence[Path], folder: Path, total: int) -> list[ChunkNote]:
    """Link all chunks' rows into ``folder``. Returns the notes, ordered by number."""
    notes: dict[int, ChunkNote] = {}
    for place in folders:
        for path in sorted(place.glob(CHUNK_NOTES)):
            number = int(path.stem.split("-")[1])
            require(
                number not in notes and number < total,
                f"{path}: one chunk too many: {total} were expected, each once; remove the folder and run again",
            )
            notes[number] = _chunk_note(path, number)
            if notes[number]["sha256"] is not None:
                link_or_copy(place / chunk_file_name(number), folder / chunk_file_name(number))
    missing = [number for number in range(total) if number not in notes]
    require(
        not missing,
        f"{folders[0].parent}: {len(missing)} of {total} chunks are missing, the first is number "
        f"{min(missing, default=0)}; make its shard again",
    )
    return [notes[number] for number in range(total)]


def _chunk_note(path: Path, number: int) -> ChunkNote:
    """A chunk's note, which must be that of the chunk whose place it has; notes of earlier versions do not say."""
    note: ChunkNote = read_json_object(path)
    name = note.get("name", chunk_file_name(number))
    require(name == chunk_file_name(number), f"{path}: is the note of {name}; remove the folder and run again")
    return note


def _write_index(notes: list[ChunkNote], folder: Path) -> dict[str, Any]:
    """Write the index. Returns facts about all rows, from the chunks' sums in the chunks' order."""
    import pyarrow
    import pyarrow.parquet

    index = [{**row, "piece": number} for number, note in enumerate(notes) for row in note["index"]]
    rejected = Rejected()
    for reason, name in (entry for note in notes for entry in note["rejected"]):
        rejected.add(reason, name)
    require(bool(index), f"no sample of the mix fits this teacher; rejected: {dict(rejected.counts)}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(index), folder / INDEX_FILE)
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
