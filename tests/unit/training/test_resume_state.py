import json
import logging
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmfusion.artifacts.resume import ResumeFolder, note_path
from llmfusion.errors import UserError
from llmfusion.io.files import sha256_file
from llmfusion.training import resume_state
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


@pytest.fixture
def folder(tmp_path):
    return ResumeFolder(tmp_path / "state", "key")


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_moments_random_state_and_records_come_back(folder):
    model, optimizer = trained(3)
    resume_state.save(folder, 3, model, optimizer, {"records": [{"step": 3, "loss": 0.1}]})
    expected = moments(model, optimizer)
    random = torch.rand(4)
    other, fresh = trained(0, seed=9)
    assert resume_state.restore(folder, other, fresh) == (3, {"records": [{"step": 3, "loss": 0.1}]})
    assert torch.equal(torch.rand(4), random)
    assert equal(model, other)
    for a, b in zip(expected, moments(other, fresh), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert sum(isinstance(a, torch.Tensor) for a in expected) == 2 * 3  # a weight and two biases have been stepped


def test_a_state_of_another_training_is_not_taken(folder, caplog):
    caplog.set_level(logging.INFO)
    model, optimizer = trained(2)
    resume_state.save(folder, 2, model, optimizer, {})
    other, fresh = trained(0, seed=9)
    before = [p.clone() for p in other.parameters()]
    assert resume_state.restore(ResumeFolder(folder.folder, "another key"), other, fresh) is None
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert not fresh.state
    assert not list(folder.folder.iterdir())
    assert caplog.messages == [
        f"{folder.folder}/step-00000002.safetensors belongs to another spec or other inputs; removed"
    ]


def one_bit(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


SPOILT = {
    "truncated": lambda content: content[:-9],
    "empty": lambda content: b"",
    "overwritten": lambda content: b"\xff" * len(content),
    "one bit": one_bit,
}


@pytest.mark.parametrize("of", ["state", "note"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_damaged_state_or_note_gives_way_to_the_state_before(folder, spoil, of, caplog):
    caplog.set_level(logging.INFO)
    for steps in (1, 2):
        path = resume_state.save(folder, steps, *trained(steps), {"records": [{"step": steps}]})
    spoilt = path if of == "state" else note_path(path)
    spoilt.write_bytes(spoil(spoilt.read_bytes()))
    other, fresh = trained(0, seed=9)
    assert resume_state.restore(folder, other, fresh) == (1, {"records": [{"step": 1}]})
    assert equal(trained(1)[0], other)
    assert caplog.messages == [f"{path} is damaged or was not finished; taking the one before"]


@pytest.mark.parametrize("missing", ["state", "note"])
def test_a_state_without_its_note_or_a_note_without_its_state_does_not_count_and_is_removed(folder, missing):
    for steps in (1, 2):
        path = resume_state.save(folder, steps, *trained(steps), {})
    (path if missing == "state" else note_path(path)).unlink()
    assert resume_state.restore(folder, *trained(0)) == (1, {})
    assert sorted(p.name for p in folder.folder.glob("*.safetensors")) == ["step-00000001.safetensors"]


def test_a_bit_of_the_records_that_flips_is_noticed_like_one_of_the_weights(folder):
    """They become part of the result, so they are hashed with the weights; the note holds what identifies the file."""
    path = resume_state.save(folder, 1, *trained(1), {"records": [{"loss": 2.34375}]})
    assert set(json.loads(note_path(path).read_bytes())) == {"key", "name", "size", "sha256", "note_sha256"}
    content = path.read_bytes()
    assert content.count(b"2.34375") == 1
    path.write_bytes(content.replace(b"2.34375", b"2.34374"))
    assert resume_state.restore(folder, *trained(0)) is None


def test_a_state_that_was_renamed_to_a_later_step_is_not_believed(folder):
    path = resume_state.save(folder, 1, *trained(1), {})
    later = path.with_name("step-00000009.safetensors")
    shutil.copyfile(path, later)
    shutil.copyfile(note_path(path), note_path(later))
    assert resume_state.restore(folder, *trained(0)) == (1, {})
    assert not later.exists()


def test_the_last_two_states_are_kept_and_no_temporary_file(folder):
    for step in (1, 2, 3, 4):
        resume_state.save(folder, step, *trained(1), {})
    assert sorted(p.name for p in folder.folder.iterdir()) == [
        f"step-0000000{n}.{end}" for n in (3, 4) for end in ("json", "safetensors")
    ]


def test_half_a_state_of_a_killed_writer_is_removed(folder):
    resume_state.save(folder, 1, *trained(1), {})
    half = folder.folder / ".step-00000002.safetensors.1234.tmp"
    half.write_bytes(b"half")
    assert resume_state.restore(folder, *trained(0)) == (1, {})
    assert not half.exists()


def test_without_any_state_a_training_begins(folder):
    assert resume_state.restore(folder, *trained(0)) is None


def free_space(monkeypatch, *sizes):
    """``shutil.disk_usage`` tells these sizes one after the other, the last one again and again."""
    usage = namedtuple("usage", "free")
    left = list(sizes)
    monkeypatch.setattr(
        resume_state.shutil, "disk_usage", lambda path: usage(left.pop(0) if len(left) > 1 else left[0])
    )


def test_where_there_is_no_room_older_states_are_removed_before_a_new_one_is_written(folder, monkeypatch):
    for step in (1, 2):
        resume_state.save(folder, step, *trained(1), {})
    free_space(monkeypatch, 10, 10**9)
    resume_state.save(folder, 3, *trained(1), {})
    assert sorted(p.name for p in folder.folder.glob("*.safetensors")) == [
        f"step-0000000{n}.safetensors" for n in (2, 3)
    ]


def test_a_state_that_does_not_fit_is_refused_and_the_last_one_stays(folder, monkeypatch):
    for step in (1, 2):
        resume_state.save(folder, step, *trained(1), {})
    free_space(monkeypatch, 10)
    with pytest.raises(
        UserError, match=r"resume state needs \d+ KiB, 0 KiB are free in .*; the last saved step is kept"
    ):
        resume_state.save(folder, 3, *trained(1), {})
    monkeypatch.undo()
    assert resume_state.restore(folder, *trained(0)) == (2, {})


def test_a_disk_that_fills_while_a_state_is_written_leaves_no_half_of_it(folder, monkeypatch):
    resume_state.save(folder, 1, *trained(1), {})

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume_state, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        resume_state.save(folder, 2, *trained(1), {})
    assert sorted(p.name for p in folder.folder.iterdir()) == ["step-00000001.json", "step-00000001.safetensors"]


def test_a_state_is_written_as_safetensors_reads_it_and_hashed_on_the_way(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7),
        "turned": torch.randn(4, 3).t(),
        "empty": torch.empty(0, 2),
        "double": torch.randn(2, dtype=torch.float64),
        "fp16": torch.ones(1).half(),
    }
    path = tmp_path / "a.safetensors"
    assert resume_state.write_tensors(tensors, path, {"step": "3"}) == sha256_file(path)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"step": "3"}
