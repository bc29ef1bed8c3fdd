"""Two processes train what one trains: the same losses step by step, the same model, and they stop and go on together."""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llmfusion.errors import UserError
from llmfusion.fusion.sources import source_of
from llmfusion.models.loading import load_model, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.teachers.capture import capture
from llmfusion.training import distributed
from llmfusion.training import run as module
from llmfusion.training.run import Trainee, train
from tests.unit.stand_ins import artifact, job

SPEC: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-2, "lr_min": 1e-3, "seed": 3}
NEOX = {"model_type": "gpt_neox", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
UDF = {"teachers": ["one", "two"], "fusion": {"target": "udf", "lambda": 0.5, "temperature": 1.5}}
PROJECTED = {"teachers": ["one", "far"], "fusion": {"target": "naive", "projector_lr": 1e-2, "projector_steps": 3}}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, mix):
    """The cache of a teacher with a vocabulary of its own: projectors are trained, and warmed up."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tokenizer({"vocabulary_size": 284, "digits": 1}, mix.file("samples.jsonl"), None)
    save_model(make_model(NEOX, tokenizer, 5), tokenizer, folder, "float32")
    return artifact(folder, **capture(artifact(folder), mix, folder, {"dtype": "float32", "batch_size": 8}, None))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two(call: Callable[[], None]) -> list[int]:
    """Exit statuses of two forked processes that are joined while they ``call``; 70 for an exception."""
    place, children = free_port(), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place))
                with distributed.joined():
                    call()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def start(tmp_path, pivot, tokenizer, mix, cache, tied_cache, foreign, monkeypatch):
    """Train from the pivot into a named job, in one or two processes; each writes its weights as the step ends."""
    monkeypatch.setattr(module, "RECORD_EVERY", 1)
    caches = {"one": cache, "two": tied_cache, "far": foreign}

    def go(name: str, spec: dict[str, Any], processes: int, spoil: Callable[[Any], None] = lambda model: None) -> list[int]:
        made = job(tmp_path, name=name)

        def one() -> None:
            model = load_model(pivot, "float32")
            spoil(model)
            sources = [source_of(t, caches[t], tokenizer, 300, "cpu", spec["fusion"]) for t in spec.get("teachers", [])]
            train(made, Trainee(model, tokenizer), spec, [mix], sources)
            torch.save(model.state_dict(), tmp_path / f"{name}-{distributed.rank()}.pt")

        if processes == 2:
            return in_two(one)
        one()
        return [0]

    return go


def weights(tmp_path, name, rank=0):
    return torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)


def records(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / name / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changed", [{}, UDF, PROJECTED, {**UDF, "micro_batch_size": 2}], ids=["sft", "udf", "projected", "micro-batches"])
def test_two_processes_have_the_losses_of_one_at_every_step(start, tmp_path, changed):
    spec = {**SPEC, **changed}
    assert start("one", spec, 1) == [0]
    assert start("two", spec, 2) == [0, 0]
    alone, together = records(tmp_path, "one"), records(tmp_path, "two")
    assert [r["step"] for r in together] == [r["step"] for r in alone] == list(range(1, 7))
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b.keys() == a.keys()
        for key in ("weight", "t2s_ce", "s2t_kl", "aligned"):
            assert b.get(key) == (pytest.approx(a[key], rel=1e-4) if key in a else None)
    for name, expected in weights(tmp_path, "one").items():
        torch.testing.assert_close(weights(tmp_path, "two")[name], expected, rtol=0, atol=2e-4)
        assert torch.equal(weights(tmp_path, "two")[name], weights(tmp_path, "two", 1)[name])  # both made the same updates


def test_each_of_two_processes_works_on_half_of_the_samples(start, tmp_path, monkeypatch):
    student, seen = module._Loop._student, tmp_path / "seen"

    def noted(self, drawn):
        with open(f"{seen}-{distributed.rank()}", "a") as file:
            file.writelines(f"{d.sample['id']}\n" for d in drawn)
        return student(self, drawn)

    monkeypatch.setattr(module._Loop, "_student", noted)
    assert start("two", {**SPEC, "steps": 3}, 2) == [0, 0]
    first, second = ((tmp_path / f"seen-{rank}").read_text().split() for rank in range(2))
    assert len(first) == len(second) == 3 * 4
    assert not set(first) & set(second)  # 24 of 29 samples, none twice


def test_sigterm_to_one_process_stops_both_after_the_same_step_and_they_go_on_bit_for_bit(start, tmp_path, monkeypatch):
    """With dropout: going on needs what the random numbers depend on."""

    def dropout(model):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1

    step = module._Loop._step

    def interrupted(self, number, samples):
        step(self, number, samples)
        if number == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_step", interrupted)
        assert start("stopped", {**SPEC, **UDF}, 2, dropout) == [143, 143]
    [state] = (tmp_path / "stopped/work/state").glob("*.safetensors")
    with safe_open(state, framework="pt") as file:
        assert file.metadata()["step"] == "3"
    assert start("stopped", {**SPEC, **UDF}, 2, dropout) == [0, 0]
    assert start("whole", {**SPEC, **UDF}, 2, dropout) == [0, 0]
    assert start("plain", {**SPEC, **UDF}, 2) == [0, 0]
    assert (tmp_path / "stopped/out/metrics.jsonl").read_bytes() == (tmp_path / "whole/out/metrics.jsonl").read_bytes()
    for name, expected in weights(tmp_path, "whole").items():
        assert torch.equal(weights(tmp_path, "stopped")[name], expected)
    assert records(tmp_path, "plain") != records(tmp_path, "whole")  # dropout is there


def test_a_loss_that_is_not_a_number_in_one_process_stops_both_in_the_same_words(start, tmp_path, monkeypatch, capfd):
    def one_is_wrong(model):
        if distributed.rank() == 1:
            model.model.norm.weight.data.fill_(torch.nan)

    assert start("nan", SPEC, 2, one_is_wrong) == [70, 70]
    assert capfd.readouterr().err.count("step 1 of 6: loss or gradient is nan at learning rate 0.01; samples ") == 2


def test_a_gradient_that_one_process_lacks_is_summed_with_zeros(tmp_path):
    def sums():
        used, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        never = torch.nn.Parameter(torch.zeros(2))
        used.grad = torch.tensor([1.0, 2.0]) * (distributed.rank() + 1)
        if distributed.rank() == 1:
            other.grad = torch.ones(2)
        distributed.sum_gradients([used, other, never])
        assert used.grad.tolist() == [3.0, 6.0]
        assert other.grad is not None
        assert other.grad.tolist() == [1.0, 1.0]
        assert never.grad is None
        assert distributed.sum_records({"b": {"x": 1.5, "a": 2}, "a": distributed.rank()}) == {"a": 1.0, "b": {"a": 4.0, "x": 3.0}}
        assert distributed.any_of(distributed.rank() == 1, False) == [True, False]
        assert distributed.same(4)
        assert not distributed.same(distributed.rank())

    assert in_two(sums) == [0, 0]


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.count()) == (0, 1)
    assert distributed.part([1, 2, 3]) == [1, 2, 3]
    assert distributed.any_of(True, False) == [True, False]
    assert distributed.sum_records({"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="x"):
        distributed.first_then_others(lambda: (_ for _ in ()).throw(UserError("x")))
