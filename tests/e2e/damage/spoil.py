"""Ways to spoil the files of an artifact, and tables of them: what is done to a file, and what the message says of it.

Nothing here imports torch or pyarrow before a file is spoiled.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]  # changes the files of a folder
Bytes = Callable[[bytes], bytes]  # changes the content of a file
Content = Callable[[Any], object]  # changes in place what a file holds: its tensors, its rows
Cases = dict[str, tuple[Spoil, str]]  # how to spoil an artifact, and what must be said (a pattern)


def cases(how: Callable[..., Spoil], file: str, table: dict[str, tuple[Any, str]], place: str = "") -> Cases:
    """A table of changes that ``how`` makes to one file, with messages that begin with the file (in ``place``)."""
    at = re.escape(f"{place}/{file}" if place else file)
    return {case: (how(file, change), f"{at}{message}") for case, (change, message) in table.items()}


def rewrite(file: str, change: Bytes) -> Spoil:
    """A change of a file's bytes."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def settings(file: str, changed: dict[str, Any]) -> Spoil:
    """Other values in a JSON file."""
    return rewrite(file, lambda content: json.dumps(json.loads(content) | changed).encode())


def unlink(file: str) -> Spoil:
    """The file is gone."""
    return lambda folder: (folder / file).unlink()


def tensors(file: str, change: Content) -> Spoil:
    """A change of a safetensors file's tensors."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(folder / file)
        change(content)
        contiguous = {key: tensor.contiguous() for key, tensor in content.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})

    return spoil


def put(name: str, index: tuple[int, ...], value: float) -> Content:
    """Another value at one place of a tensor."""
    return lambda content: content[name].__setitem__(index, value)


def cast(name: str, dtype: str) -> Content:
    """A tensor in another dtype."""

    def change(content: dict[str, Any]) -> None:
        import torch

        content[name] = content[name].to(getattr(torch, dtype))

    return change


def cut(*names: str) -> Content:
    """Tensors without their last row."""
    return lambda content: content.update({name: content[name][:-1] for name in names})


def header(file: str, change: Content) -> Spoil:
    """A change of a safetensors file's header, of the same length."""

    def rewritten(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        return content[:8] + json.dumps(entries, separators=(",", ":")).encode().ljust(length) + content[8 + length :]

    return rewrite(file, rewritten)


def parquet(file: str, change: Content) -> Spoil:
    """A change of the rows of a Parquet file."""

    def spoil(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(folder / file).to_pylist()
        change(rows)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / file)

    return spoil


def line(number: int, change: Bytes) -> Bytes:
    """A change of one line of a file, counted from 1."""

    def rewritten(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        return b"".join(lines)

    return rewritten


def row(change: Content) -> Bytes:
    """A change of the object that a line holds."""

    def rewritten(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value, sort_keys=True).encode() + b"\n"

    return rewritten


def lost(content: bytes) -> bytes:
    """The line, or the whole content, is gone."""
    return b""


def half_a_line(content: bytes) -> bytes:
    """A line that ends within its object."""
    return content[:30] + b"\n"
