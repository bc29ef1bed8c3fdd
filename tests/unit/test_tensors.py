import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.errors import DamagedError
from llmfusion.merging.tensors import as_float32, entries_of, from_float32, raw, write

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def hard_values():
    """Random float32 of every size, and all that lie exactly between two neighbours in bf16 or fp16, with their own neighbours."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    halves = np.concatenate([(np.arange(2**16, dtype=np.uint32) << 16) | low for low in (0x7FFF, 0x8000, 0x8001)])
    values = np.concatenate([bits, halves]).view(np.float32)
    near = np.arange(0x7BFF, dtype=np.uint16).view(np.float16)  # all but the largest finite one
    between = near.astype(np.float32) + np.spacing(near).astype(np.float32) / 2
    values = np.concatenate([values, between, -between])
    return values[np.abs(values) < np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs_bit_for_bit(dtype):
    values = hard_values()
    with np.errstate(over="ignore"):
        content = from_float32(values, dtype)
    expected = torch.tensor(values).to(DTYPES[dtype])
    assert content == expected.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_sixteen_bit_number_survives_the_way_to_float32_and_back(tmp_path, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[dtype])
    numbers = numbers[torch.isfinite(numbers)]
    save_file({"a": numbers}, tmp_path / "a.safetensors")
    values = as_float32(entries_of(tmp_path)["a"])
    assert np.array_equal(values.view(np.uint32), numbers.float().numpy().view(np.uint32))
    assert from_float32(values, dtype) == raw(entries_of(tmp_path)["a"]).tobytes()


def test_a_file_written_here_is_read_by_safetensors(tmp_path):
    a, b, scalar = np.arange(6, dtype=np.float32), np.arange(3, dtype="<i8"), np.float32(2.5)
    layout = {"a": ("F32", (2, 3), 24), "b": ("I64", (3,), 24), "none": ("F16", (0, 4), 0), "scalar": ("F32", (), 4)}
    write(tmp_path / "a.safetensors", layout, iter([("a", a.tobytes()), ("b", b.tobytes()), ("none", b""), ("scalar", scalar.tobytes())]))
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(found["b"], torch.arange(3))
    assert found["none"].shape == (0, 4)
    assert found["scalar"] == 2.5
    assert {name: (e.dtype, e.shape) for name, e in entries_of(tmp_path).items()} == {name: (d, s) for name, (d, s, _) in layout.items()}
    assert as_float32(entries_of(tmp_path)["none"]).size == 0


def test_a_tensor_of_another_size_than_announced_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="a: 4 bytes, expected 8"):
        write(tmp_path / "a.safetensors", {"a": ("F32", (2,), 8)}, iter([("a", b"1234")]))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda b: b[:-1], "tensor a ends at byte .*: truncated"),
        (lambda b: b[:5], "no safetensors header"),
        (lambda b: b"", "no safetensors header"),
        (lambda b: b"\xff" * 8 + b[8:], "no safetensors header"),
        (lambda b: b[:8] + b"\xff" + b[9:], "the header is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, told):
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["a"]["dtype"] == "F32"
    (tmp_path / "a.safetensors").write_bytes(spoil(content))
    with pytest.raises(DamagedError, match=f"a.safetensors: {told}"):
        entries_of(tmp_path)
