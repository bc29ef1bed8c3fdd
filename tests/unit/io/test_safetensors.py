import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.errors import DamagedError
from llmfusion.io.safetensors import layout_of, read_checkpoint_headers, tensor_bytes, tensor_values
from llmfusion.merging.blocks import PivotDeltas, Rounding

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def hard_values():
    """Random float32 of every size, and all that lie exactly between two neighbours in bf16 or fp16, with their own
    neighbours."""
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
    content, widened = Rounding(dtype, values.size)(values)
    expected = torch.tensor(values).to(DTYPES[dtype])
    assert content.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.tensor(widened), expected.float())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_sixteen_bit_number_survives_the_way_to_float32_and_back(tmp_path, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[dtype])
    numbers = numbers[torch.isfinite(numbers)]
    save_file({"a": numbers}, tmp_path / "a.safetensors")
    tensor = PivotDeltas(tensor_values(read_checkpoint_headers(tmp_path)["a"]), [])
    rounding = Rounding(dtype, tensor.size)
    blocks = [(block.theta.copy(), rounding(block.theta)[0].copy()) for block in tensor.blocks()]
    values, content = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert np.array_equal(values.view(np.uint32), numbers.float().numpy().view(np.uint32))
    assert content.tobytes() == tensor_bytes(read_checkpoint_headers(tmp_path)["a"]).tobytes()


def test_a_layout_is_a_file_that_safetensors_reads(tmp_path):
    a, b, scalar = np.arange(6, dtype=np.float32), np.arange(3, dtype="<i8"), np.float32(2.5)
    tensors = {"a": ("F32", (2, 3)), "b": ("I64", (3,)), "none": ("F16", (0, 4)), "scalar": ("F32", ())}
    layout = layout_of(tmp_path / "a.safetensors", tensors, {"format": "pt", "more": "kept"})
    content = bytearray(layout.size)
    content[: len(layout.head)] = layout.head
    for name, values in (("scalar", scalar), ("b", b), ("a", a)):  # in any order
        content[layout.tensors[name].start : layout.tensors[name].end] = values.tobytes()
    (tmp_path / "a.safetensors").write_bytes(content)
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(loaded["b"], torch.arange(3))
    assert loaded["none"].shape == (0, 4)
    assert loaded["scalar"] == 2.5
    assert read_checkpoint_headers(tmp_path) == layout.tensors
    assert tensor_values(read_checkpoint_headers(tmp_path)["none"]).size == 0


def test_tensors_at_odd_addresses_are_read(tmp_path):
    values = torch.randn(70_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "w": values}, tmp_path / "aligned.safetensors")
    body = values.view(torch.uint8).numpy().tobytes()
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "w": {"dtype": "BF16", "shape": [70000], "data_offsets": [3, 140003]},
        }
    )
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + b"\0" * 3 + body
    )
    source = tensor_values(read_checkpoint_headers(tmp_path / "odd")["w"])
    blocks = PivotDeltas(source, [source]).blocks()
    assert torch.equal(torch.tensor(np.concatenate([block.theta.copy() for block in blocks])), values.float())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:-1], "tensor a ends at byte .*: truncated"),
        (lambda b: b[:5], "no safetensors header"),
        (lambda b: b"", "no safetensors header"),
        (lambda b: b"\xff" * 8 + b[8:], "no safetensors header"),
        (lambda b: b[:8] + b"\xff" + b[9:], "the header: expected JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, message):
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["a"]["dtype"] == "F32"
    (tmp_path / "a.safetensors").write_bytes(spoil(content))
    with pytest.raises(DamagedError, match=f"a.safetensors: {message}"):
        read_checkpoint_headers(tmp_path)
