"""A merge before any work: what fits is found out from headers alone, and what it will read, write and take. Loads no compiled code."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfusion.digests import canonical
from llmfusion.merging.matching import Matching, Part, match
from llmfusion.merging.tensors import FLOATS, Layout, header_of, layout_of

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Plan:
    """A merge that has been checked and can be run: ``files`` by name, and the bytes it reads and writes."""

    matching: Matching
    method: str
    options: dict[str, Any]
    files: dict[str, Layout]
    read: int
    written: int

    @property
    def parts(self) -> list[Part]:
        return self.matching.parts

    @property
    def values(self) -> int:
        """How many values are merged."""
        return sum(part.values for part in self.parts)

    def layout(self, part: Part) -> Layout:
        """The file a tensor goes to."""
        return self.files[part.pivot.file.name]

    def identity(self) -> str:
        """What tells whether the inputs are those of an earlier run: paths, sizes and times of all files that are read."""
        files = sorted({entry.file for part in self.parts for entry in (part.pivot, *part.models)})
        states = [(str(file.resolve()), file.stat()) for file in files]
        return canonical([[path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for path, state in states])

    def memory(self, threads: int) -> int:
        """Bytes a merge takes at most, beside mapped files: the interpreter with compiled code, and each thread's blocks and histograms."""
        models = len(self.matching.models)
        return 130 * 2**20 + threads * (models + 1) * 2 * 2**20

    def seconds(self, threads: int) -> float:
        """About how long the arithmetic takes, from what was measured on cores of 2.5 GHz; a slow disk takes longer."""
        a_model = {"ta": 2e-9, "ties": 8e-9}.get(self.method, 9e-9)
        return 1.0 + self.values * (3e-9 + a_model * len(self.matching.models)) / threads


def plan(pivot: Path, models: Sequence[Path], method: str, options: dict[str, Any]) -> Plan:
    """Check a merge. Raises :class:`UserError` with every difference between the checkpoints."""
    matching = match(pivot, models)
    dtype = DTYPES.get(options.get("out_dtype", "pivot"))
    files = {}
    for file in dict.fromkeys(part.pivot.file for part in matching.parts):
        inside = [part.pivot for part in matching.parts if part.pivot.file == file]
        names = [part.name for part in matching.parts if part.pivot.file == file]
        tensors = {name: ((dtype or entry.dtype) if entry.dtype in FLOATS else entry.dtype, entry.shape) for name, entry in zip(names, inside, strict=True)}
        files[file.name] = layout_of(Path(file.name), tensors, header_of(file)[0].get("__metadata__"))
    read = sum(entry.end - entry.start for part in matching.parts for entry in (part.pivot, *part.models))
    return Plan(matching, method, options, files, read, sum(layout.size for layout in files.values()))


def default_threads() -> int:
    """``OMP_NUM_THREADS``, which Snakemake sets to a job's threads, else the cores this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
