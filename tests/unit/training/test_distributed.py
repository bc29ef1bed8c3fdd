"""Two processes train what one trains: the same losses at each step, the same model; they stop and go on together."""

import json
import logging
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
from llmfusion.fusion.teacher import load_teacher
from llmfusion.models.loading import load_model, save_model
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.study.schema.base_models import Architecture, Tokenizer
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.capture import capture
from llmfusion.training import distributed, resume_state, sharding
from llmfusion.training import loop as module
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import artifact
from tests.unit.training.options import run_of

OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-2, "lr_min": 1e-3, "seed": 3}
NEOX = Architecture(
    model_type="gpt_neox",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.3,
)
UDF = {"teachers": ["base/one", "base/two"], "fusion": {"target": "udf", "lambda": 0.5, "temperature": 1.5}}
PROJECTED = {
    "teachers": ["base/one", "base/far"],
    "fusion": {"target": "naive", "projector_lr": 1e-2, "projector_steps": 3},
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, mix):
    """The cache of a teacher with a vocabulary of its own: projectors are trained, and warmed up."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = make_tokenizer(Tokenizer(vocabulary_size=284, digits=1), mix.file("samples.jsonl"), None)
    save_model(make_model(NEOX, tokenizer, 5), tokenizer, folder, "float32")
    return artifact(folder, **capture(artifact(folder), mix, folder, Capture(dtype="float32", batch_size=8), None))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two(call: Callable[[], None]) -> list[int]:
    """Exit statuses of two forked processes in one process group while they ``call``; 70 for an exception."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os._exit(_joined_as(rank, port, call))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _joined_as(rank: int, port: int, call: Callable[[], None]) -> int:
    """Exit status of one of the two processes, which logs to standard output as a job does."""
    local = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    try:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        os.environ.update(local, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        # renews torch's pool, which a fork leaves behind, before two threads of the child try to at once
        torch.set_num_threads(1)
        with distributed.process_group():
            call()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@pytest.fixture
def start(tmp_path, pivot, tied_teacher, tokenizer, mix, cache, tied_cache, foreign, monkeypatch):
    """Train from the pivot in one or two processes, with resume states in ``NAME/state``; a record of every step.

    The first process leaves ``NAME.jsonl``, each leaves its weights.
    """
    monkeypatch.setattr(module, "RECORD_EVERY", 1)
    caches = {"base/one": cache, "base/two": tied_cache, "base/far": foreign}

    def go(
        name: str,
        options: dict[str, Any],
        processes: int,
        spoil: Callable[[Any], None] = lambda model: None,
        tied: bool = False,
        key: str = "f",
    ) -> list[int]:
        # the schema asks for `processes` with `sharding`; here they are forks of this process
        sharded = {"sharding": options["sharding"]} if "sharding" in options else {}
        run = run_of(**{k: v for k, v in options.items() if k not in sharded}).model_copy(update=sharded)

        def one() -> None:
            student = Student(sharding.load(tied_teacher if tied else pivot, run), tokenizer)
            spoil(student.model)
            teachers = [load_teacher(t, caches[t], tokenizer, 300, "cpu", run.fusion) for t in run.teachers]
            result = train(student, run, run.fusion, [mix], teachers, tmp_path / name / "state", key)
            if distributed.rank() == 0:
                lines = [json.dumps(record, sort_keys=True) + "\n" for record in result.records]
                (tmp_path / f"{name}.jsonl").write_text("".join(lines))
            model = sharding.gather_full_model(student.model, torch.float32)
            if model is not None:
                torch.save(model.state_dict(), tmp_path / f"{name}-{distributed.rank()}.pt")

        if processes == 2:
            return in_two(one)
        one()
        return [0]

    return go


def weights(tmp_path, name, rank=0):
    return torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)


def records(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changed", [{}, UDF, PROJECTED, {**UDF, "micro_batch_size": 2}], ids=["sft", "udf", "projected", "micro-batches"]
)
def test_two_processes_have_the_losses_of_one_at_every_step(start, tmp_path, changed):
    options = {**OPTIONS, **changed}
    assert start("one", options, 1) == [0]
    assert start("two", options, 2) == [0, 0]
    alone = records(tmp_path, "one")
    together = records(tmp_path, "two")
    assert [r["step"] for r in together] == [r["step"] for r in alone] == list(range(1, 7))
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b.keys() == a.keys()
        for key in ("weight", "t2s_ce", "s2t_kl", "aligned"):
            assert b.get(key) == (pytest.approx(a[key], rel=1e-4) if key in a else None)
    first, second = (weights(tmp_path, "two", rank) for rank in range(2))
    for name, expected in weights(tmp_path, "one").items():
        torch.testing.assert_close(first[name], expected, rtol=0, atol=2e-4)
        assert torch.equal(first[name], second[name])  # both made the same updates


def test_each_of_two_processes_works_on_half_of_the_samples(start, tmp_path, monkeypatch):
    student_batch = module._Loop._student_batch

    def noted(self, samples):
        with open(tmp_path / f"seen-{distributed.rank()}", "a") as file:
            file.writelines(f"{sample.sample['id']}\n" for sample in samples)
        return student_batch(self, samples)

    monkeypatch.setattr(module._Loop, "_student_batch", noted)
    assert start("two", {**OPTIONS, "steps": 3}, 2) == [0, 0]
    first, second = ((tmp_path / f"seen-{rank}").read_text().split() for rank in range(2))
    assert len(first) == len(second) == 3 * 4
    assert not set(first) & set(second)  # 24 of 29 samples, none twice


SHARDED = {"sharding": "full"}


@pytest.mark.parametrize(
    "changed",
    [
        {"clip_norm": 0.05},
        {"optimizer": "adamw", "activation_checkpointing": True},
        {**UDF, "micro_batch_size": 2, "cautious_norm": "numel_plus_1"},
        {**UDF, "micro_batch_tokens": 120},
        {**UDF, "precision": "bfloat16", "activation_checkpointing": True, "micro_batch_size": 1},
        PROJECTED,
    ],
    ids=["clipped", "adamw, checkpointing", "micro-batches, numel_plus_1", "by tokens", "bfloat16", "projected"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_model_split_over_two_processes_trains_as_in_one(start, tmp_path, pivot, tied_teacher, changed, tied):
    options = {**OPTIONS, "lr": 1e-3, **changed}
    assert start("one", options, 1, tied=tied) == [0]
    assert start("two", {**options, **SHARDED}, 2, tied=tied) == [0, 0]
    for a, b in zip(records(tmp_path, "one"), records(tmp_path, "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        for key in ("weight", "t2s_ce", "s2t_kl", "aligned"):
            assert b.get(key) == (pytest.approx(a[key], rel=1e-4) if key in a else None)
    alone = weights(tmp_path, "one")
    together = weights(tmp_path, "two")
    assert list(together) == list(alone)
    before = load_model(tied_teacher if tied else pivot, "float32").state_dict()
    for name, expected in alone.items():
        moved = (expected - before[name]).norm()
        assert (together[name] - expected).norm() <= 1e-3 * moved, name  # of the way the tensor has come
    assert not (tmp_path / "two-1.pt").exists()


def test_bfloat16_parameters_can_be_split_too(start, tmp_path):
    options = {**OPTIONS, "parameters": "bfloat16"}
    assert start("one", options, 1) == [0]
    assert start("two", {**options, **SHARDED}, 2) == [0, 0]
    assert {t.dtype for t in weights(tmp_path, "one").values()} == {torch.bfloat16}
    for a, b in zip(records(tmp_path, "one"), records(tmp_path, "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
    assert records(tmp_path, "two")[-1]["loss"] < 0.9 * records(tmp_path, "two")[0]["loss"]


def dropout(model):
    model.config.attention_dropout = 0.1  # what an empty twin is made from
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1


def interrupting(monkeypatch, number, by=signal.SIGTERM):
    """The second process gets a signal as step ``number`` (from 0) ends; undone with the ``with``."""
    step = module._Loop._step

    def interrupted(self, at, indices):
        step(self, at, indices)
        if at == number and distributed.rank() == 1:
            os.kill(os.getpid(), by)

    monkeypatch.setattr(module._Loop, "_step", interrupted)


@pytest.mark.parametrize(
    "how",
    [{}, SHARDED, {**SHARDED, "activation_checkpointing": True}],
    ids=["whole", "sharded", "sharded, checkpointing"],
)
def test_sigterm_to_one_process_stops_both_after_the_same_step_and_they_go_on_bit_for_bit(
    start, tmp_path, monkeypatch, how
):
    """With dropout: going on needs what the random numbers depend on."""
    options = {**OPTIONS, **UDF, **how}
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        assert start("stopped", options, 2, dropout) == [143, 143]
    states = sorted((tmp_path / "stopped/state").glob("*.safetensors"))
    assert [p.name for p in states] == [
        f"step-00000003.{part}safetensors" for part in (("1-of-2.", "2-of-2.") if "sharding" in how else ("",))
    ]
    with safe_open(states[0], framework="pt") as file:
        assert file.metadata()["name"] == states[0].name
    assert start("stopped", options, 2, dropout) == [0, 0]
    assert start("whole", options, 2, dropout) == [0, 0]
    assert start("plain", options, 2) == [0, 0]
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for name, expected in weights(tmp_path, "whole").items():
        assert torch.equal(weights(tmp_path, "stopped")[name], expected)
    assert records(tmp_path, "plain") != records(tmp_path, "whole")  # dropout is there


@pytest.fixture
def killed(start, tmp_path, monkeypatch):
    """A sharded training, a state after each step, whose second process was killed before part 2 of the fourth."""
    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    assert start("whole", {**OPTIONS, **UDF, **SHARDED}, 2) == [0, 0]
    write = resume_state.write_tensors

    def killed_at_four(tensors, path, metadata):
        if path.name.startswith(".step-00000004.2-of-2.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(resume_state, "write_tensors", killed_at_four)
        assert start("killed", {**OPTIONS, **UDF, **SHARDED}, 2) == [70, -signal.SIGKILL]
    state = tmp_path / "killed/state"
    assert {p.name.split(".")[0] for p in state.iterdir()} == {"step-00000002", "step-00000003", "step-00000004"}
    return state


def went_on_as_the_undisturbed(tmp_path):
    expected = weights(tmp_path, "whole")
    same = [torch.equal(value, expected[name]) for name, value in weights(tmp_path, "killed").items()]
    return all(same) and len(same) == len(expected) and records(tmp_path, "killed") == records(tmp_path, "whole")


def test_a_sharded_state_counts_only_when_all_parts_are_there(start, tmp_path, killed, capfd):
    assert start("killed", {**OPTIONS, **UDF, **SHARDED}, 2) == [0, 0]
    assert (
        "step-00000004.2-of-2.safetensors is damaged or was not finished; taking the one before"
        in capfd.readouterr().out
    )
    assert went_on_as_the_undisturbed(tmp_path)


@pytest.mark.parametrize("part", ["1-of-2.safetensors", "2-of-2.safetensors", "2-of-2.json"])
def test_a_damaged_part_is_named_by_its_own_process_and_both_take_the_state_before(
    start, tmp_path, killed, part, capfd
):
    path = killed / f"step-00000003.{part}"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert start("killed", {**OPTIONS, **UDF, **SHARDED}, 2) == [0, 0]
    assert capfd.readouterr().out.count("step-00000003.") == 1
    assert went_on_as_the_undisturbed(tmp_path)


def test_a_state_of_another_number_of_processes_is_refused_in_words(start, tmp_path, killed, capfd):
    assert start("killed", {**OPTIONS, **UDF}, 2) == [70, 70]
    assert (
        "the state after step 4 is of 2 processes, this training has 1: parts are not cut anew. "
        "Go on with what the study said then (`processes: 2`)"
    ) in capfd.readouterr().err
    assert (killed / "step-00000003.1-of-2.safetensors").exists()


def test_it_is_refused_as_well_where_the_number_is_part_of_the_spec(start, killed):
    with pytest.raises(UserError, match="the state after step 4 is of 2 processes, this training has 1"):
        start("killed", {**OPTIONS, **UDF}, 1, key="another")
    assert (killed / "step-00000003.1-of-2.safetensors").exists()


def test_a_loss_that_is_not_a_number_in_one_process_stops_both_in_the_same_words(start, tmp_path, monkeypatch, capfd):
    def one_is_wrong(model):
        if distributed.rank() == 1:
            model.model.norm.weight.data.fill_(torch.nan)

    assert start("nan", OPTIONS, 2, one_is_wrong) == [70, 70]
    assert capfd.readouterr().err.count("step 1 of 6: loss or gradient is nan at learning rate 0.01; samples ") == 2


def test_a_gradient_that_one_process_lacks_is_summed_with_zeros(tmp_path):
    def sums():
        used, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        never = torch.nn.Parameter(torch.zeros(2))
        used.grad = torch.tensor([1.0, 2.0]) * (distributed.rank() + 1)
        if distributed.rank() == 1:
            other.grad = torch.ones(2)
        distributed.all_reduce_gradients([used, other, never])
        assert used.grad.tolist() == [3.0, 6.0]
        assert other.grad is not None
        assert other.grad.tolist() == [1.0, 1.0]
        assert never.grad is None
        assert distributed.all_reduce_record({"b": {"x": 1.5, "a": 2}, "a": distributed.rank()}) == {
            "a": 1.0,
            "b": {"a": 4.0, "x": 3.0},
        }
        assert distributed.any_across_ranks(distributed.rank() == 1, False) == [True, False]

    assert in_two(sums) == [0, 0]


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_across_ranks(True, False) == [True, False]
    assert distributed.all_reduce_record({"a": 1}) == {"a": 1}
