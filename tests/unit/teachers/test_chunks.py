"""Which shard makes which chunk, and what cannot be assembled."""

import json

import pytest

from llmfusion.errors import UserError
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, chunk_file_name
from llmfusion.teachers.chunks import Shard, assemble


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 4)  # 29 samples: 8 chunks


def shard_folder(folder, numbers, head):
    """A shard's folder as far as it is looked at before anything is read."""
    folder.mkdir()
    for number in numbers:
        (folder / f"piece-{number:05d}.json").write_text(json.dumps({"sha256": "0" * 64}))
        (folder / chunk_file_name(number)).write_bytes(b"rows")
    if head:
        (folder / "head.safetensors").write_bytes(b"head")
    return folder


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (["even"], "4 of 8 chunks are missing, the first is number 1; make its shard again"),
        (["even", "even"], "one chunk too many: 8 were expected, each once"),
        (["even", "odd", "beyond"], "one chunk too many: 8 were expected, each once"),
        (["odd", "headless"], "head.safetensors lies in 0 folders"),
        (["even", "odd_with_head"], "head.safetensors lies in 2 folders"),
    ],
)
def test_a_chunk_that_is_missing_or_there_twice_is_named(tmp_path, shards, message):
    even, odd = range(0, 8, 2), range(1, 8, 2)
    folders = {
        "even": shard_folder(tmp_path / "even", even, head=True),
        "odd": shard_folder(tmp_path / "odd", odd, head=False),
        "headless": shard_folder(tmp_path / "headless", even, head=False),
        "odd_with_head": shard_folder(tmp_path / "odd_with_head", odd, head=True),
        "beyond": shard_folder(tmp_path / "beyond", [8], head=False),
    }
    out = tmp_path / "assembled"
    out.mkdir()
    with pytest.raises(UserError, match=message):
        assemble([folders[name] for name in shards], out, 29, "hidden")


def test_every_chunk_belongs_to_exactly_one_shard():
    for samples in (1, 3, 4, 5, 29, 400):
        for count in (1, 2, 7, 50):
            numbers = [n for i in range(count) for n in Shard(i, count).chunks(samples, "hidden")]
            assert sorted(numbers) == list(range(-(-samples // 4)))
    assert Shard() == Shard(0, 1)
