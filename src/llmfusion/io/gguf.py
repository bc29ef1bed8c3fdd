"""The header of a GGUF file, checked in one pass before any library believes it.

Layout: the magic bytes, a version, counts of tensors and of metadata; metadata as key, type, value; for each tensor
its name, dimensions, type and offset; then, aligned, the tensors. See
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmfusion.errors import DamagedError
from llmfusion.io.files import model_file

VERSIONS = (2, 3)
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
STRING = 8
ARRAY = 9
UINT32 = 4
INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
TOKENIZER_ARRAYS = {  # with the types of their items
    "tokenizer.ggml.tokens": (STRING,),
    "tokenizer.ggml.merges": (STRING,),
    "tokenizer.ggml.scores": (6, 12),
    "tokenizer.ggml.token_type": INTEGERS,
}
MOST_TENSORS = 1_000_000
MOST_KEYS = 100_000
LAYER = re.compile(r"blk\.(\d{1,9})\.")  # of tensors' names
MOST_ITEMS = 4_000_000  # of an array: tokens and merges of the largest tokenizers are a tenth of it
LONGEST_STRING = 16 * 2**20  # bytes
LARGEST_HEADER = 512 * 2**20
LARGEST_ALIGNMENT = 2**16
MOST_DIMENSIONS = 4
REMEDY = "fetch the file again, or convert the model again with llama.cpp"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it: its shape, fastest dimension first, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; ``metadata`` has arrays by their length."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]

    @property
    def architecture(self) -> str:
        """The family, as llama.cpp names it."""
        return str(self.metadata["general.architecture"])

    @property
    def values(self) -> int:
        """How many values all tensors have."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of a GGUF file with a tokenizer. Raises :class:`DamagedError`, in time that its size bounds."""
    path = model_file(file.parent, file.name)
    try:
        with open(path, "rb") as handle:
            return _Reader(handle, path).read()
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}; give yourself the right to read it") from None


class _Reader:
    """One pass over a file's header."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file = file
        self.path = path
        self.size = path.stat().st_size
        self.array_types: dict[str, int] = {}

    def read(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise self.wrong("does not begin with the bytes GGUF: it is no GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            found = "is a GGUF file of big-endian numbers" if swapped else f"is GGUF of version {version}"
            raise self.wrong(f"{found}, expected little-endian of version {' or '.join(map(str, VERSIONS))}")
        tensor_count = self.count(MOST_TENSORS, 24, "tensors")
        metadata = self._metadata(self.count(MOST_KEYS, 13, "metadata keys"))
        alignment = self._alignment(metadata)
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        start = -(-self.file.tell() // alignment) * alignment
        tensors = self._located(entries, start, alignment)
        self._require_model(metadata, tensors)
        return GgufHeader(metadata, tensors)

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.text("a metadata key")
            if key in metadata:
                raise self.wrong(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(key, self.number("I"))
        return metadata

    def _value(self, key: str, kind: int) -> Any:
        """A value of metadata; of an array its length."""
        if kind in FORMATS:
            return self.number(FORMATS[kind])
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            raise self.wrong(f"{key} has a value of type {kind}, which GGUF does not have")
        item = self.number("I")
        if item not in (*FORMATS, STRING):
            raise self.wrong(f"{key} is an array of type {item}, expected numbers or strings")
        width = 8 if item == STRING else struct.calcsize(FORMATS[item])
        count = self.count(MOST_ITEMS, width, f"items of {key}")
        if item == STRING:
            for _ in range(count):
                self.take(self.length(key))
        else:
            self.take(count * width)
        self.array_types[key] = item
        return count

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        is_power = type(alignment) is int and 8 <= alignment <= LARGEST_ALIGNMENT and not alignment & (alignment - 1)
        if not is_power or "general.alignment" in self.array_types:
            raise self.wrong(f"general.alignment is {alignment!r:.80}, expected a power of two to {LARGEST_ALIGNMENT}")
        return int(alignment)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.text("a tensor's name")
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise self.wrong(f"tensor {name!r} has {dimensions} dimensions, expected at most {MOST_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")

    def _located(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> list[GgufTensor]:
        """The tensors in the order of their bytes, which do not overlap and end within the file."""
        tensors = []
        for name, shape, kind, offset in entries:
            if offset % alignment:
                raise self.wrong(f"tensor {name!r} begins at {offset}, no multiple of the alignment {alignment}")
            begin = start + offset
            tensors.append(GgufTensor(name, shape, begin, begin + self._bytes(name, shape, kind)))
        tensors.sort(key=lambda tensor: tensor.start)
        end = start
        for tensor in tensors:
            if tensor.start < end:
                raise self.wrong(f"tensor {tensor.name!r} overlaps another one")
            if tensor.end > self.size:
                raise self.wrong(
                    f"tensor {tensor.name!r} ends at byte {tensor.end}, the file at {self.size}: truncated"
                )
            end = tensor.end
        names = [tensor.name for tensor in tensors]
        if len(set(names)) < len(names):
            raise self.wrong("has two tensors of the same name")
        return tensors

    def _bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """How many bytes a tensor takes."""
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self.wrong(f"tensor {name!r} is of type {kind}, which ggml does not have")
        values = math.prod(shape)
        in_block, block_bytes = sizes[kind]
        if not shape or not 0 < values < 2**62 or shape[0] % in_block:
            blocks = f"blocks of {in_block} values" if in_block > 1 else "values"
            raise self.wrong(f"tensor {name!r} has the shape {list(shape)}, which is not made of {blocks}")
        return values // in_block * block_bytes

    def _require_model(self, metadata: dict[str, Any], tensors: list[GgufTensor]) -> None:
        """Raise :class:`DamagedError` unless there are weights, layers and a tokenizer of a causal language model."""
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture.isprintable() or not architecture:
            raise self.wrong(f"general.architecture is {architecture!r:.80}, expected a name such as 'llama'")
        key = f"{architecture}.block_count"
        blocks = None if key in self.array_types else metadata.get(key)
        if type(blocks) is not int or not 0 < blocks <= len(tensors):
            layers = f"{architecture}.block_count is {blocks!r:.80}"
            raise self.wrong(f"{layers}, expected a number of layers up to that of its tensors, {len(tensors)}")
        stored = {int(found[1]) for tensor in tensors if (found := LAYER.match(tensor.name))}
        if stored and max(stored) >= blocks:  # transformers would leave the others out, and say nothing
            raise self.wrong(f"{key} is {blocks}, its tensors are of {max(stored) + 1} layers")
        if not isinstance(metadata.get("tokenizer.ggml.model"), str):
            raise self.wrong("says no tokenizer.ggml.model: it has no tokenizer")
        if not metadata.get("tokenizer.ggml.tokens"):
            raise self.wrong("has no tokens (tokenizer.ggml.tokens): it has no tokenizer")
        for key, items in TOKENIZER_ARRAYS.items():
            if key in metadata and self.array_types.get(key) not in items:
                raise self.wrong(f"{key} is no list of {'texts' if STRING in items else 'numbers'}")
        for key in ("bos", "eos", "padding", "unknown"):
            self._require_token(metadata, f"tokenizer.ggml.{key}_token_id")

    def _require_token(self, metadata: dict[str, Any], key: str) -> None:
        token = metadata.get(key)
        tokens = metadata["tokenizer.ggml.tokens"]
        if token is not None and (type(token) is not int or not 0 <= token < tokens):
            raise self.wrong(f"{key} is {token!r:.80}, expected the id of one of its {tokens} tokens")

    # ---------------------------------------------------------------------------------------- bytes
    def take(self, count: int) -> bytes:
        """The next bytes. Raises :class:`DamagedError` where the file, or what may be a header, ends before."""
        end = self.file.tell() + count
        if end > min(self.size, LARGEST_HEADER):
            raise self.wrong(f"its header ends behind byte {min(self.size, LARGEST_HEADER)}: truncated or damaged")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        """The next number of a :mod:`struct` format."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        """The next number, of things that take at least some bytes each in what follows."""
        count = self.number("Q")
        if count > min(most, (self.size - self.file.tell()) // least_bytes):
            raise self.wrong(f"claims {count} {what[:80]}, more than it can have")
        return int(count)

    def length(self, what: str) -> int:
        """The next number, as the length of a string."""
        length = self.number("Q")
        if length > LONGEST_STRING:
            raise self.wrong(f"{what[:80]} is a string of {length} bytes, expected at most {LONGEST_STRING}")
        return int(length)

    def text(self, what: str) -> str:
        """The next string."""
        try:
            return self.take(self.length(what)).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what[:80]} is no text in UTF-8") from None

    def wrong(self, found: str) -> DamagedError:
        """The error that says what was found."""
        shown = "".join(c if c.isprintable() else "?" for c in found)
        return DamagedError(f"{self.path}: {shown}; {REMEDY}")
