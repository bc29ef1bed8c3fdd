"""Rows of a cache on disk: read, never mapped, and read ahead."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfusion.errors import DamagedError
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers import cache as cache_module
from llmfusion.teachers.cache import TeacherCache
from llmfusion.teachers.capture import capture
from tests.unit.stand_ins import artifact


@pytest.fixture
def large(monkeypatch):
    """Caches are read as large ones are."""
    monkeypatch.setattr(cache_module, "IN_MEMORY_BYTES", 0)


@pytest.mark.parametrize("kind", ["hidden", "topk", "online"])
def test_a_large_cache_gives_the_rows_of_a_small_one(tmp_path, teacher, mix, monkeypatch, kind):
    facts = capture(teacher, mix, tmp_path, Capture(kind=kind, dtype="float32"), None)
    stored = artifact(tmp_path, **facts)
    source = (lambda samples: []) if kind == "online" else None
    small = TeacherCache(stored, source)
    monkeypatch.setattr(cache_module, "IN_MEMORY_BYTES", 0)
    large = TeacherCache(stored, source)
    assert (small.in_memory, large.in_memory) == (True, False)
    for sample in small.index:
        from_memory, from_disk = small.rows(sample), large.rows(sample)
        assert from_memory.keys() == from_disk.keys()
        for name, tensor in from_memory.items():
            assert torch.equal(tensor, from_disk[name])
            assert tensor.dtype == from_disk[name].dtype


def test_rows_are_read_not_mapped_and_are_the_callers_own(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = TeacherCache(artifact(tmp_path, **cache.facts))
    first = stored.rows("s03")
    expected = {name: tensor.clone() for name, tensor in first.items()}
    first["hidden"].fill_(7)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.rows("s03").items())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_chunk_cut_while_it_is_in_use_is_named(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = TeacherCache(artifact(tmp_path, **cache.facts))
    stored.rows("s03")
    os.truncate(tmp_path / "piece-00000.safetensors", 1000)
    with pytest.raises(
        DamagedError, match=r"piece-00000.safetensors: ends before byte \d+: it was cut while it was in use"
    ):
        stored.rows("raw")


def test_prefetching_asks_for_exactly_the_bytes_that_are_read_later(cache, large, monkeypatch):
    stored = TeacherCache(cache)
    advised, read = [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, how: advised.append((start, size, how)))
    preadv = os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda handle, buffers, at: (
            read.append((at, len(buffers[0]), os.POSIX_FADV_WILLNEED)),
            preadv(handle, buffers, at),
        )[1],
    )
    stored.prefetch(["s03", "twice"])
    assert read == []
    for sample in ("s03", "twice"):
        stored.rows(sample)
    assert len(read) == 10
    assert sorted(advised) == sorted(read)


def resident(path):
    """Pages of a file that are in the system's memory; None where it does not tell."""
    mapped = np.memmap(path, np.uint8, "r")
    states = (ctypes.c_ubyte * -(-mapped.size // mmap.PAGESIZE))()
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), states)
    return None if failed else sum(state & 1 for state in states)


def test_what_is_prefetched_is_in_memory_before_it_is_read(tmp_path, cache, large):
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = TeacherCache(artifact(tmp_path, **cache.facts))
    path = tmp_path / "piece-00000.safetensors"
    stored.rows("s03")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) != 0:
        pytest.skip("this file system keeps everything in memory")
    stored.prefetch(list(stored.index))
    for _ in range(100):
        if resident(path) == -(-path.stat().st_size // mmap.PAGESIZE):
            return
        time.sleep(0.05)
    pytest.fail(f"{resident(path)} pages after 5 s")
