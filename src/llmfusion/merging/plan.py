"""A merge before any work, from headers alone: what fits, and what it will read, write and take.

Imports no compiled code.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmfusion.io.digests import canonical
from llmfusion.io.files import model_file
from llmfusion.io.safetensors import FLOATS, INDEX, FileLayout, TensorInfo, layout_of, read_header
from llmfusion.merging.blocks import count_layers
from llmfusion.merging.matching import Matching, TensorMatch, match
from llmfusion.study.schema.options import MergeOptions

# files about the pivot, not about the merge
NOTES = (
    "manifest.json",
    "provenance.json",
    "metrics.jsonl",
    "merge_report.csv",
    "merge_report.json",
    "README.md",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # the pivot's, unmerged
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked and can be run: ``files`` by name, and the bytes it reads and writes."""

    matching: Matching
    options: MergeOptions
    files: dict[str, FileLayout]
    bytes_read: int
    bytes_written: int

    @property
    def tensors(self) -> list[TensorMatch]:
        """All tensors of the merge, in the order of the pivot's files."""
        return self.matching.tensors

    @property
    def merged_values(self) -> int:
        """How many values are merged."""
        return sum(tensor.merged_values for tensor in self.tensors)

    @cached_property
    def layers(self) -> int:
        """How many layers the model has, as the names of its tensors say."""
        return count_layers(tensor.name for tensor in self.tensors)

    def target(self, tensor: TensorMatch) -> TensorInfo:
        """Where a tensor of the merge is written: in a file of the pivot's name."""
        return self.files[tensor.pivot.file.name].tensors[tensor.name]

    @cached_property
    def sources(self) -> list[Path]:
        """All files of weights that are read."""
        return sorted({info.file for tensor in self.tensors for info in tensor.sources})

    def identity(self) -> str:
        """What shows whether inputs are those of an earlier run: paths, sizes and times of all files that are read."""
        states = [(str(file.resolve()), file.stat()) for file in self.sources]
        return canonical(
            [[path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for path, state in states]
        )

    def memory(self, threads: int) -> int:
        """Bytes a merge takes at most, beside mapped files.

        The interpreter with compiled code, and each thread's blocks and histograms.
        """
        models = len(self.matching.models)
        return 130 * 2**20 + threads * (models + 1) * 2 * 2**20

    def seconds(self, threads: int) -> float:
        """About how long the arithmetic takes, from what was measured on cores of 2.5 GHz; a slow disk takes longer."""
        per_value = 3e-9 + self.options.seconds_per_value * len(self.matching.models)
        return 1.0 + self.merged_values * per_value / threads


def plan_merge(pivot: Path, models: Sequence[Path], options: MergeOptions) -> MergePlan:
    """Check a merge. Raises :class:`UserError` with every difference between the checkpoints."""
    matching = match(pivot, models)
    list(other_files(pivot))  # they are copied last: what is wrong with them is said first
    dtype = DTYPES.get(options.out_dtype)
    files = {
        file.name: _layout(file, [tensor for tensor in matching.tensors if tensor.pivot.file == file], dtype)
        for file in dict.fromkeys(tensor.pivot.file for tensor in matching.tensors)
    }
    bytes_read = sum(info.nbytes for tensor in matching.tensors for info in tensor.sources)
    return MergePlan(matching, options, files, bytes_read, sum(layout.size for layout in files.values()))


def _layout(file: Path, tensors: Sequence[TensorMatch], dtype: str | None) -> FileLayout:
    """A file of the merge: the pivot's tensors in their order, floating-point ones in ``dtype`` if that is given."""
    kinds = {
        tensor.name: (
            (dtype or tensor.pivot.dtype) if tensor.pivot.dtype in FLOATS else tensor.pivot.dtype,
            tensor.pivot.shape,
        )
        for tensor in tensors
    }
    return layout_of(Path(file.name), kinds, read_header(file)[0].get("__metadata__"))


def other_files(pivot: Path) -> Iterator[Path]:
    """Files of the pivot that its merge has too. Raises :class:`DamagedError` for one that is no plain file."""
    for path in sorted([*pivot.iterdir(), *pivot.glob("additional_chat_templates/*.jinja")]):
        about_weights = path.suffix in WEIGHTS or path.name in NOTES or _is_stale_index(path)
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and not path.name.startswith(".") and not about_weights:
            yield model_file(pivot, str(path.relative_to(pivot)))


def _is_stale_index(path: Path) -> bool:
    """Whether a file is the index of weights that are not merged, or of shards beside a whole file."""
    if not path.name.endswith(".index.json"):
        return False
    return path.name != INDEX or (path.parent / "model.safetensors").exists()


def default_threads() -> int:
    """``OMP_NUM_THREADS``, which Snakemake sets to a job's threads, else the cores this process may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else len(os.sched_getaffinity(0))
