"""Merge checkpoints at the speed of the disk: inputs memory-mapped, the output written in place, tensors in a pool of
threads.

The output has the pivot's files, each with its header first; every tensor is written at its offset, block by block. A
journal records which tensors are finished, with a checksum: a merge that was killed goes on with the next one and gives
the same bytes.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmfusion.errors import DamagedError, UserError, require
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import common_rights, copy_file, default_rights, plain_file, read_json_object, sha256_file, sync
from llmfusion.io.safetensors import INDEX, OVERFLOW, SIZES, TensorInfo, tensor_bytes, tensor_values
from llmfusion.merging import kernels
from llmfusion.merging.blocks import BLOCK, Array, Block, PivotDeltas, Rounding
from llmfusion.merging.journal import FinishedTensor, Journal
from llmfusion.merging.matching import TensorMatch
from llmfusion.merging.plan import MergePlan, default_threads, other_files
from llmfusion.merging.report import Row, report_row, require_own_notes, require_same_notes, totals, write_report
from llmfusion.study.merge_methods import load_method
from llmfusion.study.schema.base import dump

JOURNAL = "journal.jsonl"
COPY_BYTES = 4 * 2**20  # bytes copied at a time

Progress = Callable[[int, int], None]
"""Called with the bytes read and written so far, and those of the whole run."""


def run(
    plan: MergePlan, out: Path, key: str, threads: int | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge into the folder ``out``, which may hold what a killed run of the same ``key`` left.

    Writes weights, ``merge_report.csv`` and ``.json``, and everything of the pivot that is no weights. Returns facts,
    and an XXH3 checksum (64 bits, as hex) a tensor. Raises :class:`UserError` for values that are not finite, in an
    input or in the merge.
    """
    options = plan.options
    # of the method also its text: no merge goes on with tensors of another version of it
    source = sha256_file(Path(str(load_method(options.method).__file__)))
    settings = [options.method, dump(options, "method", "pivot", "parents"), options.recipe, source]
    journal = Journal(out / JOURNAL, digest(key, canonical(settings)))
    finished = _lay_out_files(plan, out, journal)
    missing = [tensor for tensor in plan.tensors if tensor.name not in finished]
    missing.sort(key=lambda tensor: -math.prod(tensor.pivot.shape))  # the longest first
    report_progress = _progress_in_bytes(plan, missing, progress)
    first = next((entry["row"] for entry in finished.values() if entry["row"]), None)
    with closing(_merge_in_threads(plan, out, missing, threads or default_threads())) as results:
        for tensor, result in results:
            if result["row"]:
                first = first or result["row"]
                require_same_notes(options.method, result["row"], first)
            finished[tensor.name] = result
            journal.add(tensor.name, result)
            report_progress(tensor)
    return _finish(plan, out, finished), {tensor.name: finished[tensor.name]["xxh3"] for tensor in plan.tensors}


def _merge_in_threads(
    plan: MergePlan, out: Path, tensors: Sequence[TensorMatch], threads: int
) -> Generator[tuple[TensorMatch, FinishedTensor], None, None]:
    """Merge tensors in a pool of threads; yields each once it is written. Closing the generator ends the threads."""
    stop = threading.Event()
    with ExitStack() as stack:
        handles = {}
        for name in plan.files:
            handles[name] = os.open(out / name, os.O_RDWR)
            stack.callback(os.close, handles[name])
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(stop.set)
        futures = {
            pool.submit(_merge_tensor, plan, tensor, handles[tensor.pivot.file.name], stop): tensor
            for tensor in tensors
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


def _progress_in_bytes(
    plan: MergePlan, tensors: Sequence[TensorMatch], progress: Progress | None
) -> Callable[[TensorMatch], None]:
    """A function that is called with each finished tensor and reports the bytes read and written."""
    sizes = {t.name: sum(info.nbytes for info in (*t.sources, plan.target(t))) for t in tensors}
    total = sum(sizes.values())
    done = 0

    def report(tensor: TensorMatch) -> None:
        nonlocal done
        done += sizes[tensor.name]
        if progress:
            progress(done, total)

    return report


# ------------------------------------------------------------------------------------------------ one tensor
def _merge_tensor(plan: MergePlan, tensor: TensorMatch, handle: int, stop: threading.Event) -> FinishedTensor:
    """Merge and write one tensor, or copy the pivot's where there is nothing to merge it with."""
    target = plan.target(tensor)
    write = _Writer(handle, target.start)
    row = None
    if tensor.models:
        row = _write_merge(plan, tensor, write, stop)
    _copy(tensor, target.dtype, tensor.merged_values, write)
    return {"xxh3": write.checksum.hexdigest(), "row": row}


def _write_merge(plan: MergePlan, tensor: TensorMatch, write: "_Writer", stop: threading.Event) -> Row:
    """Write the merged values of a tensor; returns its row of the report."""
    theta, *models = (tensor_values(info)[: tensor.merged_values] for info in tensor.sources)
    labels = [f"{info.file}: tensor {tensor.name}" for info in tensor.sources]
    deltas = PivotDeltas(theta, models, labels, name=tensor.name, shape=tensor.merged_shape, layers=plan.layers)
    merge = load_method(plan.options.method).merge(deltas, plan.options)
    require_own_notes(plan.options.method, merge.notes)
    rounding = _CheckedRounding(tensor, plan.target(tensor))
    for block in deltas.blocks():
        if stop.is_set():
            break
        write(rounding(block, merge.merge_block(block)))
    return report_row(tensor.name, deltas, merge, rounding.changed, rounding.squares)


class _CheckedRounding:
    """Rounds the merge of a tensor to the dtype it is written in, and counts what differs from the pivot afterwards."""

    def __init__(self, tensor: TensorMatch, target: TensorInfo):
        self.changed = 0
        self.squares = 0.0  # of the differences
        self._name = tensor.name
        self._dtype = target.dtype
        self._round = Rounding(target.dtype, min(tensor.merged_values, BLOCK))
        exact = target.dtype in (tensor.pivot.dtype, "F32")  # the pivot's values are there as they are
        self._round_pivot = None if exact else Rounding(target.dtype, min(tensor.merged_values, BLOCK))

    def __call__(self, block: Block, merged: Array) -> NDArray[Any]:
        """A block of the merge as it is stored."""
        _require_finite(merged, self._dtype, self._name)
        content, after = self._round(merged)
        before = block.theta if self._round_pivot is None else self._round_pivot(block.theta)[1]
        changed, squares = kernels.moved(after, before)
        self.changed += changed
        self.squares += squares
        return content


def _require_finite(values: Array, dtype: str, name: str) -> None:
    if not np.uint32(kernels.magnitude(values)).view(np.float32) < OVERFLOW[dtype]:  # nor for a NaN
        raise UserError(f"tensor {name}: the merge is not finite in {dtype}; nothing was published")


def _copy(tensor: TensorMatch, dtype: str, start: int, write: "_Writer") -> None:
    """Write the pivot's values from ``start`` on, in another dtype if the merge has one."""
    if dtype == tensor.pivot.dtype:
        content = tensor_bytes(tensor.pivot)[start * SIZES[dtype] if start else 0 :]
        for offset in range(0, content.size, COPY_BYTES):
            write(content[offset : offset + COPY_BYTES])
        return
    values = tensor_values(tensor.pivot)[start:]
    rounding = Rounding(dtype, min(values.size, BLOCK))
    for block in PivotDeltas(values, [], [f"{tensor.pivot.file}: tensor {tensor.name}"]).blocks():
        _require_finite(block.theta, dtype, tensor.name)
        write(rounding(block.theta)[0])


class _Writer:
    """Writes one array behind the other from an offset on, and keeps the checksum of what was written."""

    def __init__(self, handle: int, offset: int):
        self.handle = handle
        self.offset = offset
        self.checksum = xxhash.xxh3_64()

    def __call__(self, content: NDArray[Any]) -> None:
        view = np.ascontiguousarray(content).view(np.uint8).data
        self.checksum.update(view)
        while len(view):
            written = os.pwrite(self.handle, view, self.offset)
            self.offset += written
            view = view[written:]


# ------------------------------------------------------------------------------------------------ resuming
def _lay_out_files(plan: MergePlan, out: Path, journal: Journal) -> dict[str, FinishedTensor]:
    """Lay out the files, keeping what an earlier run has written completely; returns that."""
    finished = _finished_before(plan, out, journal)
    if not finished:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _remove_others(plan, out)
    for name, layout in plan.files.items():
        with open(out / name, "r+b" if finished else "wb") as file:
            file.write(layout.head)
            file.truncate(layout.size)
    journal.start(finished)
    return finished


def _remove_others(plan: MergePlan, out: Path) -> None:
    """Remove what no killed run of this merge left: its own files are rewritten, all others would be published."""
    for path in out.iterdir():
        if path.name in (*plan.files, JOURNAL) and not path.is_symlink() and path.is_file():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finished_before(plan: MergePlan, out: Path, journal: Journal) -> dict[str, FinishedTensor]:
    """Tensors that the journal has, in files of the right size and with the checksums it has."""
    for name, layout in plan.files.items():
        try:
            size = plain_file(out, name).stat().st_size
        except DamagedError:
            return {}
        if size != layout.size:
            return {}
    targets = {tensor.name: plan.target(tensor) for tensor in plan.tensors}
    return {
        name: finished
        for name, finished in journal.read().items()
        if name in targets and _checksum(out, targets[name]) == finished["xxh3"]
    }


def _checksum(out: Path, target: TensorInfo) -> str:
    checksum = xxhash.xxh3_64()
    with open(out / target.file, "rb") as file:
        file.seek(target.start)
        for offset in range(target.start, target.end, COPY_BYTES):
            checksum.update(file.read(min(COPY_BYTES, target.end - offset)))
    return checksum.hexdigest()


# ------------------------------------------------------------------------------------------------ finishing
def _finish(plan: MergePlan, out: Path, finished: dict[str, FinishedTensor]) -> dict[str, Any]:
    """Write the report and the pivot's other files; returns facts."""
    rows = [row for tensor in plan.tensors if (row := finished[tensor.name]["row"])]
    require(bool(rows), f"{plan.matching.pivot.folder}: has no floating-point weights to merge")
    _copy_other_files(plan, out)
    facts = totals(rows, plan.options.method, plan.options.warn_below)
    write_report(out, plan.options, rows, facts)
    (out / JOURNAL).unlink()
    _set_rights(plan, out)
    return facts


def _set_rights(plan: MergePlan, out: Path) -> None:
    """Nothing gets more rights than what it was made from: the weights that were read, or the pivot's own file."""
    pivot = plan.matching.pivot.folder
    copied = {str(path.relative_to(pivot)): path for path in other_files(pivot)}
    of_weights = common_rights(plan.sources)
    for path in sorted(out.rglob("*")):
        if path.is_file():
            source = copied.get(str(path.relative_to(out)))
            rights = of_weights if source is None else common_rights([source])
            path.chmod(default_rights() & 0o666 & rights | 0o600)
            sync(path)


def _copy_other_files(plan: MergePlan, out: Path) -> None:
    """Tokenizer, chat templates, settings: what lies beside the pivot's weights, byte for byte."""
    pivot = plan.matching.pivot.folder
    for path in other_files(pivot):
        target = out / path.relative_to(pivot)
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        copy_file(path, target)
    index = out / INDEX
    if not index.exists() or plan.options.out_dtype == "pivot":
        return
    content = read_json_object(index)
    if isinstance(content.get("metadata"), dict):  # the one thing in it that another dtype makes wrong
        content["metadata"]["total_size"] = sum(plan.target(tensor).nbytes for tensor in plan.tensors)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
