"""Merge checkpoints at the speed of the disk: inputs memory-mapped, the output written in place, tensors in a pool of threads.

The output has the pivot's files, each with its header first; every tensor is written at its offset, block by block. A journal tells
which tensors are finished, with a checksum: a merge that was killed goes on with the next one and gives the same bytes.
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmfusion.errors import UserError, require
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import sync
from llmfusion.io.safetensors import FLOATS, OVERFLOW, tensor_bytes, tensor_values
from llmfusion.merging import kernels
from llmfusion.merging.blocks import BLOCK, Array, PivotDeltas, Rounding
from llmfusion.merging.journal import Done, Journal
from llmfusion.merging.matching import TensorMatch
from llmfusion.merging.methods import METHODS
from llmfusion.merging.plan import MergePlan, default_threads
from llmfusion.merging.report import Row, row_of, totals, write_report
from llmfusion.study.kinds.merge_models import KIND
from llmfusion.study.schema.base import dump

NOTES = (
    "manifest.json",
    "provenance.json",
    "metrics.jsonl",
    "merge_report.csv",
    "merge_report.json",
    "README.md",
)  # about the pivot, not the merge
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # the pivot's, unmerged
JOURNAL = "journal.jsonl"
COPIED = 4 * 2**20  # bytes at a time

Told = Callable[[int, int], None]  # bytes read and written so far, and in all by this run


def run(
    work: MergePlan, out: Path, key: str, threads: int | None = None, progress: Told | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge into the folder ``out``, which may hold what a killed run of the same ``key`` left. Returns facts, and an XXH3 checksum (64 bits, as hex) a tensor.

    Writes weights, ``merge_report.csv`` and ``.json``, and everything of the pivot that is no weights. Raises :class:`UserError` for
    values that are not finite, in an input or in the merge.
    """
    journal = Journal(out / JOURNAL, digest(key, canonical([dump(work.options, "pivot", "parents"), KIND.recipe])))
    done = _continued(work, out, journal)
    handles = {name: os.open(out / name, os.O_RDWR) for name in work.files}
    stop = threading.Event()
    waiting = sorted(
        (part for part in work.parts if part.name not in done), key=lambda part: -math.prod(part.pivot.shape)
    )  # the longest first
    total, moved = sum(_bytes(work, part) for part in waiting), 0
    try:
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            try:
                futures = {
                    pool.submit(_merge_part, work, part, handles[part.pivot.file.name], stop): part for part in waiting
                }
                for future in as_completed(futures):
                    part = futures[future]
                    done[part.name] = future.result()
                    journal.add(part.name, done[part.name])
                    moved += _bytes(work, part)
                    if progress:
                        progress(moved, total)
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
    finally:
        for handle in handles.values():
            os.close(handle)
    return _finish(work, out, done), {part.name: done[part.name]["xxh3"] for part in work.parts}


def _bytes(work: MergePlan, part: TensorMatch) -> int:
    """How many bytes of a tensor are read and written."""
    return sum(entry.end - entry.start for entry in (part.pivot, *part.models, work.layout(part).entries[part.name]))


# ------------------------------------------------------------------------------------------------ one tensor
def _merge_part(work: MergePlan, part: TensorMatch, handle: int, stop: threading.Event) -> Done:
    target = work.layout(part).entries[part.name]
    write = _Writer(handle, target.start, stop)
    if not part.models:
        _copy(part, target.dtype, 0, write)
        return {"xxh3": write.checksum.hexdigest(), "row": None}
    sources = [tensor_values(entry)[: part.values] for entry in (part.pivot, *part.models)]
    labels = [f"{entry.file}: tensor {part.name}" for entry in (part.pivot, *part.models)]
    tensor = PivotDeltas(sources[0], sources[1:], labels)
    merging = METHODS[work.options.method](tensor, work.options)
    rounded, rounded_pivot = (Rounding(target.dtype, min(part.values, BLOCK)) for _ in range(2))
    changed, squares = 0, 0.0
    for block in tensor.blocks():
        if stop.is_set():
            break
        merged = merging.merge(block)
        _check(merged, target.dtype, part.name)
        content, after = rounded(merged)
        before = block.theta if target.dtype in (part.pivot.dtype, "F32") else rounded_pivot(block.theta)[1]
        count, square = kernels.moved(after, before)
        changed, squares = changed + count, squares + square
        write(content)
    _copy(part, target.dtype, part.values, write)
    return {"xxh3": write.checksum.hexdigest(), "row": row_of(part.name, tensor, merging, changed, squares)}


def _check(values: Array, dtype: str, name: str) -> None:
    if not np.uint32(kernels.magnitude(values)).view(np.float32) < OVERFLOW[dtype]:  # nor for a NaN
        raise UserError(f"tensor {name}: the merge is not finite in {dtype}; nothing was published")


def _copy(part: TensorMatch, dtype: str, start: int, write: "_Writer") -> None:
    """The pivot's values from ``start`` on, in another dtype if that is asked for."""
    if dtype == part.pivot.dtype:
        content = tensor_bytes(part.pivot)[start * FLOATS[dtype].itemsize if start else 0 :]
        for at in range(0, content.size, COPIED):
            write(content[at : at + COPIED])
        return
    values = tensor_values(part.pivot)[start:]
    rounded = Rounding(dtype, min(values.size, BLOCK))
    for block in PivotDeltas(values, [], [f"{part.pivot.file}: tensor {part.name}"]).blocks():
        _check(block.theta, dtype, part.name)
        write(rounded(block.theta)[0])


class _Writer:
    """Writes one array behind the other from an offset on, and keeps the checksum of what was written."""

    def __init__(self, handle: int, at: int, stop: threading.Event):
        self.handle, self.at, self.stop, self.checksum = handle, at, stop, xxhash.xxh3_64()

    def __call__(self, content: NDArray[Any]) -> None:
        view = np.ascontiguousarray(content).view(np.uint8).data
        self.checksum.update(view)
        while len(view):
            written = os.pwrite(self.handle, view, self.at)
            self.at += written
            view = view[written:]


# ------------------------------------------------------------------------------------------------ going on, and finishing
def _continued(work: MergePlan, out: Path, journal: Journal) -> dict[str, Done]:
    """Lay out the files, keeping what an earlier run has written whole; returns that."""
    names = {part.name: part for part in work.parts}
    done = {name: entry for name, entry in journal.read().items() if name in names}
    if any(
        not (out / name).exists() or (out / name).stat().st_size != layout.size for name, layout in work.files.items()
    ):
        done = {}
    done = {name: entry for name, entry in done.items() if _checksum(out, work, names[name]) == entry["xxh3"]}
    if not done:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for name, layout in work.files.items():
        with open(out / name, "r+b" if done else "wb") as file:
            file.write(layout.head)
            file.truncate(layout.size)
    journal.start(done)
    return done


def _checksum(out: Path, work: MergePlan, part: TensorMatch) -> str:
    entry, checksum = work.layout(part).entries[part.name], xxhash.xxh3_64()
    with open(out / entry.file, "rb") as file:
        file.seek(entry.start)
        for at in range(entry.start, entry.end, COPIED):
            checksum.update(file.read(min(COPIED, entry.end - at)))
    return checksum.hexdigest()


def _finish(work: MergePlan, out: Path, done: dict[str, Done]) -> dict[str, Any]:
    rows: list[Row] = [done[part.name]["row"] for part in work.parts if done[part.name]["row"]]
    require(bool(rows), f"{work.matching.pivot.folder}: has no floating-point weights to merge")
    _copy_rest(work, out)
    facts = totals(rows, work.options.method, work.options.warn_below)
    write_report(out, work.options, rows, facts)
    (out / JOURNAL).unlink()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            sync(path)
    return facts


def _copy_rest(work: MergePlan, out: Path) -> None:
    """Tokenizer, chat templates, settings: what lies beside the pivot's weights, byte for byte."""
    pivot = work.matching.pivot.folder
    for path in _rest(pivot):
        target = out / path.relative_to(pivot)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    index = out / "model.safetensors.index.json"
    if index.exists() and work.options.out_dtype != "pivot":  # the one thing in it that another dtype makes wrong
        content = json.loads(index.read_bytes())
        if isinstance(content.get("metadata"), dict):
            content["metadata"]["total_size"] = sum(
                e.end - e.start for layout in work.files.values() for e in layout.entries.values()
            )
            index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _rest(pivot: Path) -> Iterator[Path]:
    for path in sorted([*pivot.iterdir(), *pivot.glob("additional_chat_templates/*.jinja")]):
        stale = path.name.endswith(".index.json") and (
            path.name != "model.safetensors.index.json" or (pivot / "model.safetensors").exists()
        )
        if (
            path.is_file()
            and path.suffix not in WEIGHTS
            and path.name not in NOTES
            and not path.name.startswith(".")
            and not stale
        ):
            yield path


def progress_callback(started: float) -> Told:
    """A progress callback that keeps one line on a terminal up to date: share done, and bytes read and written a second."""

    def tell(moved: int, total: int) -> None:
        rate = moved / max(time.monotonic() - started, 1e-9)
        end = "\n" if moved == total else ""
        print(
            f"\r{moved / total:4.0%} of {total / 1e9:,.2f} GB, {rate / 1e9:.2f} GB/s",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    return tell if sys.stderr.isatty() else lambda moved, total: None
