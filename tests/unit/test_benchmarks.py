"""The GPU benchmark at tiny sizes on a CPU: its parts compute what they claim; without a GPU it measures nothing."""

import pytest
import torch

from benchmarks import gpu

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "vocab_size": 5000,
}


def test_without_a_gpu_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 0
    assert capsys.readouterr().out == "no GPU: nothing was measured\n"


def test_both_losses_are_the_same_number_with_the_same_gradients():
    given = gpu.case(37, 101, 16, torch.float32, "cpu")
    values = []
    gradients = []
    for loss in (gpu.ours, gpu.plain):
        given.hidden.grad = given.head.grad = None
        value = loss(given)
        value.backward()
        values.append(float(value.detach()))
        gradients.append((given.hidden.grad, given.head.grad))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert gpu.cost(gpu.ours, given, repeats=1)[0] > 0


def test_a_small_student_goes_through_capture_and_trainings(tmp_path):
    sizes = {"count": 8, "words": 10, "max_length": 128, "batch_size": 4, "micro_batch_size": 2, "steps": 4}
    results = gpu.throughputs(tmp_path, TINY, sizes, "bfloat16")
    assert list(results) == ["capture", "sft", "knowledge fusion from the cache"]
    assert all(one["tokens_per_second"] > 0 for one in results.values())
