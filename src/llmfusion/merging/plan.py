"""A merge before any work: what fits is found out from headers alone, and what it will read, write and take. Loads no compiled code."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmfusion.io.digests import canonical
from llmfusion.io.safetensors import FLOATS, FileLayout, layout_of, read_header
from llmfusion.merging.matching import Matching, TensorMatch, match
from llmfusion.study.schema.options import MergeOptions

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked and can be run: ``files`` by name, and the bytes it reads and writes."""

    matching: Matching
    options: MergeOptions
    files: dict[str, FileLayout]
    read: int
    written: int

    @property
    def parts(self) -> list[TensorMatch]:
        return self.matching.parts

    @property
    def values(self) -> int:
        """How many values are merged."""
        return sum(part.values for part in self.parts)

    def layout(self, part: TensorMatch) -> FileLayout:
        """The file a tensor goes to."""
        return self.files[part.pivot.file.name]

    def identity(self) -> str:
        """What tells whether the inputs are those of an earlier run: paths, sizes and times of all files that are read."""
        files = sorted({entry.file for part in self.parts for entry in (part.pivot, *part.models)})
        states = [(str(file.resolve()), file.stat()) for file in files]
        return canonical(
            [[path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for path, state in states]
        )

    def memory(self, threads: int) -> int:
        """Bytes a merge takes at most, beside mapped files: the interpreter with compiled code, and each thread's blocks and histograms."""
        models = len(self.matching.models)
        return 130 * 2**20 + threads * (models + 1) * 2 * 2**20

    def seconds(self, threads: int) -> float:
        """About how long the arithmetic takes, from what was measured on cores of 2.5 GHz; a slow disk takes longer."""
        a_model = self.options.seconds_per_value
        return 1.0 + self.values * (3e-9 + a_model * len(self.matching.models)) / threads


def plan_merge(pivot: Path, models: Sequence[Path], options: MergeOptions) -> MergePlan:
    """Check a merge. Raises :class:`UserError` with every difference between the checkpoints."""
    matching = match(pivot, models)
    dtype = DTYPES.get(options.out_dtype)
    files = {}
    for file in dict.fromkeys(part.pivot.file for part in matching.parts):
        inside = [part.pivot for part in matching.parts if part.pivot.file == file]
        names = [part.name for part in matching.parts if part.pivot.file == file]
        tensors = {
            name: ((dtype or entry.dtype) if entry.dtype in FLOATS else entry.dtype, entry.shape)
            for name, entry in zip(names, inside, strict=True)
        }
        files[file.name] = layout_of(Path(file.name), tensors, read_header(file)[0].get("__metadata__"))
    read = sum(entry.end - entry.start for part in matching.parts for entry in (part.pivot, *part.models))
    return MergePlan(matching, options, files, read, sum(layout.size for layout in files.values()))


def default_threads() -> int:
    """``OMP_NUM_THREADS``, which Snakemake sets to a job's threads, else the cores this process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
