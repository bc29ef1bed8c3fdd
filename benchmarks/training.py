"""The trainer against its goals, in one run: ``python -m benchmarks.training``.

Which weights a step at lr 1e-6 moves, what saving costs, whether two processes compute what one does, and what
sorting by length and recomputing activations do to tokens a second and to memory. Times are compared within the run
only. Takes about four minutes; a quiet machine gives better times.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import small
from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.artifacts.store import Artifact, read
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.models.scratch import make_model
from llmfusion.study.addresses import output_of
from llmfusion.study.schema.base_models import Architecture
from llmfusion.study.schema.training import Training
from llmfusion.training import distributed, resume_state, sharding
from llmfusion.training.loop import SAVE_SECONDS, Student, TrainingResult, train
from llmfusion.training.optim import CautiousAdamW
from tests.unit.training.test_distributed import in_two

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
WIDE: dict[str, Any] = {
    **SHAPE,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
RUN = Training(mix="m", steps=4, batch_size=16, lr=1e-3, seed=3)
MODES: dict[str, dict[str, Any]] = {
    "four at a time": {"micro_batch_size": 4},
    "sorted, 1,024 tokens at a time": {"micro_batch_tokens": 1024},
    "recomputed, four at a time": {"micro_batch_size": 4, "activation_checkpointing": True},
    "recomputed, sorted": {"micro_batch_tokens": 1024, "activation_checkpointing": True},
}


def report(claim: str, goal: str, measured: str) -> None:
    print(f"{claim:62} {goal:12} {measured}", flush=True)


def moved(model: Any, dtype: torch.dtype) -> float:
    """Share of the weights with a gradient that are other numbers after C-AdamW's first step at lr 1e-6."""
    model = model.to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].flatten()
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)  # (N, d)
    fused_loss(hidden, model.get_output_embeddings().weight, None, labels).loss.div(labels.numel()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    CautiousAdamW(model.parameters(), lr=1e-6).step()
    with_gradient = 0
    changed = 0
    for old, p in zip(before, model.parameters(), strict=True):
        assert p.grad is not None
        with_gradient += int(p.grad.ne(0).sum())
        changed += int((p.grad.ne(0) & p.detach().ne(old)).sum())
    return changed / with_gradient


def saving(folder: Path, model: Any) -> tuple[float, int]:
    """Median seconds of saving a resume state, and its parameters."""
    optimizer = CautiousAdamW(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = ResumeFolder(folder, "benchmark")
    seconds = []
    for step in range(3):
        began = time.monotonic()
        resume_state.save(states, step, model, optimizer, {})
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds), sum(p.numel() for p in model.parameters())


def published(root: Path, address: str) -> Artifact:
    return read(root / output_of(address), memory=None)


def training(root: Path, name: str, run: Training) -> TrainingResult:
    """One training of the pivot, with a record and a timing of each step."""
    pivot = published(root, "models/base/pivot")
    student = Student(sharding.load(pivot, run), load_tokenizer(pivot, None))
    mix = published(root, "data/mix/m")
    with small.every_step_recorded():
        return train(student, run, None, [mix], [], root / name / "state", "benchmark")


def losses(root: Path, name: str, run: Training, processes: int) -> list[float]:
    """The loss of every step of one training, shared by ``processes``."""
    path = root / f"{name}.json"

    def one() -> None:
        result = training(root, name, run)
        if distributed.rank() == 0:
            path.write_text(json.dumps([record["loss"] for record in result.records]))
        distributed.barrier()

    with contextlib.redirect_stdout(sys.stderr):
        if processes == 1:
            one()
        elif in_two(one) != [0, 0]:
            raise SystemExit("one of the two processes failed")
    values: list[float] = json.loads(path.read_bytes())
    return values


def memory(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(root: Path, mode: str) -> None:
    """Print tokens a second, padded share, and MiB at the peak, all and beyond those before the first step, as JSON.

    For a process of its own.
    """
    pivot = published(root, "models/base/pivot")
    mix = published(root, "data/mix/m")
    student = Student(load_model(pivot, "float32"), load_tokenizer(pivot, None))
    run = RUN.model_copy(update=MODES[mode])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    with small.every_step_recorded():
        result = train(student, run, None, [mix], [], root / mode.replace(" ", "-"), "benchmark")
    timings = result.measured["timings"][1:]  # the first step allocates
    tokens = sum(t["tokens_per_second"] * t["seconds"] for t in timings)
    peak = memory("VmHWM")
    measured = {
        "speed": tokens / sum(t["seconds"] for t in timings),
        "padding": statistics.mean(t["padding"] for t in timings),
        "peak": peak,
        "more": peak - before,
    }
    print(json.dumps(measured))


def main() -> None:
    """All measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1])
        return
    with tempfile.TemporaryDirectory(prefix="llmfusion-benchmark-") as name:
        root = Path(name)
        _, tokenizer, model = small.pieces(root, small.samples(96, 20, 400), SHAPE, 2048, 1024)
        small.checkpoint(root, "pivot", model, tokenizer)
        print(f"{'claim':62} {'goal':12} measured", flush=True)
        _weights(tokenizer)
        _saves(root, tokenizer)
        _processes(root)
        _speeds(root)


def _model(shape: dict[str, Any], tokenizer: Any) -> Any:
    return make_model(Architecture.model_validate(shape), tokenizer, 1)


def _weights(tokenizer: Any) -> None:
    shares = [moved(_model(SHAPE, tokenizer), dtype) for dtype in (torch.float32, torch.bfloat16)]
    report("first step at lr 1e-6: weights with a gradient that move, float32", ">= 90 %", f"{shares[0]:.1%}")
    report("  the same weights in bfloat16", "about 2 %", f"{shares[1]:.1%}")


def _saves(root: Path, tokenizer: Any) -> None:
    seconds, parameters = saving(root / "state", _model(WIDE, tokenizer))
    rate = 12 * parameters / seconds
    share = seconds / (seconds + SAVE_SECONDS)
    claim = f"saving {parameters / 1e6:.0f}M parameters every {SAVE_SECONDS:.0f} s: share of the time"
    report(claim, "<= 5 %", f"{share:.2%} ({seconds:.1f} s a save)")
    large = 12 * 8e9 / rate
    share = large / (large + SAVE_SECONDS)
    measured = f"{share:.1%} ({large:.0f} s at {rate / 1e6:,.0f} MB/s)"
    report("  8B at the same bytes a second, by one process", "", measured)


def _processes(root: Path) -> None:
    alone = losses(root, "one", RUN, 1)
    for how in ("none", "full"):
        together = losses(root, f"two-{how}", RUN.model_copy(update={"sharding": how}), 2)
        worst = max(abs(b / a - 1) for a, b in zip(alone, together, strict=True))
        claim = f"two processes, sharding: {how}: loss against one, worst of {len(alone)} steps"
        report(claim, "<= 1e-5", f"{worst:.1e}")


def _speeds(root: Path) -> None:
    results = {mode: _measured(root, mode) for mode in MODES}
    first = next(iter(results.values()))
    for mode, one in results.items():
        speed = f"{one['speed']:,.0f}; {one['padding']:.0%} padding; peak {one['peak']:,.0f} MiB"
        ratios = f"{one['speed'] / first['speed']:.2f}x the speed, {one['more'] / first['more']:.2f}x the memory"
        report(f"tokens a second, {mode}", "", f"{speed}; {ratios} of a step")


def _measured(root: Path, mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", "--measure", str(root), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
