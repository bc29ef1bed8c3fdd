import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmfusion.io.files import sha256_file
from llmfusion.training import resume_state as checkpoint
from llmfusion.training.optim import CautiousAdamW


def trained(steps, seed=0):
    """A small net with a tied weight and a frozen-by-neglect one, after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = CautiousAdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model[1](model[0](torch.rand(3, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments(model, optimizer):
    return [optimizer.state[p].get(key) for p in model.parameters() for key in ("step", "exp_avg", "exp_avg_sq")]


def test_weights_moments_random_state_and_records_come_back(tmp_path):
    model, optimizer = trained(3)
    checkpoint.save(tmp_path, 3, "print", model, optimizer, [{"step": 3, "loss": 0.1}])
    expected, drawn = moments(model, optimizer), torch.rand(4)
    other, fresh = trained(0, seed=9)
    assert checkpoint.restore(tmp_path, "print", other, fresh) == (3, [{"step": 3, "loss": 0.1}])
    assert torch.equal(torch.rand(4), drawn)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for a, b in zip(expected, moments(other, fresh), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert sum(isinstance(a, torch.Tensor) for a in expected) == 2 * 3  # a weight and two biases have been stepped


def test_a_state_of_another_training_is_not_taken(tmp_path):
    model, optimizer = trained(2)
    checkpoint.save(tmp_path, 2, "print", model, optimizer, [])
    other, fresh = trained(0, seed=9)
    before = [p.clone() for p in other.parameters()]
    assert checkpoint.restore(tmp_path, "another print", other, fresh) is None
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert not fresh.state
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:-9], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]],
    ids=["truncated", "empty", "overwritten", "one bit"],
)
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, spoil):
    for steps in (1, 2):
        path = checkpoint.save(tmp_path, steps, "print", *trained(steps), [{"step": steps}])
    path.write_bytes(spoil(path.read_bytes()))
    other, fresh = trained(0, seed=9)
    assert checkpoint.restore(tmp_path, "print", other, fresh) == (1, [{"step": 1}])
    assert all(torch.equal(a, b) for a, b in zip(trained(1)[0].parameters(), other.parameters(), strict=True))


def test_the_last_two_states_are_kept_and_no_temporary_file(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, "print", *trained(1), [])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-0000000{n}.{end}" for n in (3, 4) for end in ("safetensors", "sha256")
    ]


def test_without_any_state_a_training_begins(tmp_path):
    assert checkpoint.restore(tmp_path / "none", "print", *trained(0)) is None


def test_a_state_is_written_as_safetensors_reads_it_and_hashed_on_the_way(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8), "half": torch.randn(5).bfloat16(), "scalar": torch.tensor(7), "turned": torch.randn(4, 3).t(),
        "empty": torch.empty(0, 2), "double": torch.randn(2, dtype=torch.float64), "fp16": torch.ones(1).half(),
    }  # fmt: skip
    told = checkpoint.write_tensors(tensors, tmp_path / "a.safetensors", {"step": "3"})
    assert told == sha256_file(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "3"}
