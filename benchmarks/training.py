"""The trainer against its goals, in one run: ``python -m benchmarks.training``. Takes about four minutes; a quiet machine gives better times.

Which weights a step at lr 1e-6 moves, what saving costs, whether two processes compute what one does, and what sorting by length
and recomputing activations do to tokens a second and to memory. Times are compared within the run only.
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
from tests.unit.test_distributed import in_two

from benchmarks import small
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.models.scratch import make_model
from llmfusion.training import distributed, sharding
from llmfusion.training import loop as run
from llmfusion.training import resume_state as checkpoint
from llmfusion.training.loop import Student, train
from llmfusion.training.optim import CautiousAdamW
from tests.unit.stand_ins import artifact, job

SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
WIDE = {**SHAPE, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SPEC: dict[str, Any] = {"steps": 4, "batch_size": 16, "lr": 1e-3, "seed": 3}
MODES: dict[str, dict[str, Any]] = {
    "four at a time": {"micro_batch_size": 4},
    "sorted, 1,024 tokens at a time": {"micro_batch_tokens": 1024},
    "recomputed, four at a time": {"micro_batch_size": 4, "activation_checkpointing": True},
    "recomputed, sorted": {"micro_batch_tokens": 1024, "activation_checkpointing": True},
}


def say(claim: str, goal: str, found: str) -> None:
    print(f"{claim:62} {goal:12} {found}", flush=True)


def moved(model: Any, dtype: torch.dtype) -> float:
    """Share of the weights with a gradient that are other numbers after C-AdamW's first step at lr 1e-6."""
    model = model.to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    fused_loss(hidden, model.get_output_embeddings().weight, None, ids[:, 1:].flatten()).loss.div(
        ids[:, 1:].numel()
    ).backward()
    before = [p.detach().clone() for p in model.parameters()]
    CautiousAdamW(model.parameters(), lr=1e-6).step()
    with_gradient = changed = 0
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
    took = []
    for step in range(3):
        began = time.monotonic()
        checkpoint.save(folder, step, "benchmark", model, optimizer, {})
        took.append(time.monotonic() - began)
    return statistics.median(took), sum(p.numel() for p in model.parameters())


def losses(root: Path, name: str, changed: dict[str, Any], processes: int) -> list[float]:
    """The loss of every step of one training, shared by ``processes``."""
    spec = {**SPEC, **changed}

    def one() -> None:
        pivot = artifact(root / "results/models/base/pivot")
        student_model = Student(sharding.load(pivot, spec), load_tokenizer(pivot, None))
        with small.every_step_recorded():
            train(
                job(root, name=name), student_model, spec, [artifact(root / "results/data/mix/m", max_length=1024)], []
            )
        distributed.barrier()

    with contextlib.redirect_stdout(sys.stderr):
        if processes == 1:
            one()
        elif in_two(one) != [0, 0]:
            raise SystemExit("one of the two processes failed")
    return [json.loads(line)["loss"] for line in (root / name / "out/metrics.jsonl").read_text().splitlines()]


def memory(what: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(what)
    )


def measure(root: Path, mode: str) -> None:
    """Print tokens a second, share of padding, and MiB at the peak, all and beyond those before the first step; for a process of its own."""
    pivot = artifact(root / "results/models/base/pivot")
    model, made = load_model(pivot, "float32"), job(root, name=mode.replace(" ", "-"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    with small.every_step_recorded():
        train(
            made,
            Student(model, load_tokenizer(pivot, None)),
            {**SPEC, **MODES[mode]},
            [artifact(root / "results/data/mix/m", max_length=1024)],
            [],
        )
    timings = made.measured["training"]["timings"][1:]  # the first step allocates
    tokens, seconds = sum(t["tokens_per_second"] * t["seconds"] for t in timings), sum(t["seconds"] for t in timings)
    peak = memory("VmHWM")
    print(
        json.dumps(
            {
                "speed": tokens / seconds,
                "padding": statistics.mean(t["padding"] for t in timings),
                "peak": peak,
                "more": peak - before,
            }
        )
    )


def main() -> None:
    """All measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        measure(Path(given.measure[0]), given.measure[1])
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


def _weights(tokenizer: Any) -> None:
    shares = [moved(make_model(SHAPE, tokenizer, 1), dtype) for dtype in (torch.float32, torch.bfloat16)]
    say("first step at lr 1e-6: weights with a gradient that move, float32", ">= 90 %", f"{shares[0]:.1%}")
    say("  the same weights in bfloat16", "about 2 %", f"{shares[1]:.1%}")


def _saves(root: Path, tokenizer: Any) -> None:
    seconds, parameters = saving(root / "state", make_model(WIDE, tokenizer, 1))
    rate = 12 * parameters / seconds
    share = seconds / (seconds + run.SAVE_SECONDS)
    say(
        f"saving {parameters / 1e6:.0f}M parameters every {run.SAVE_SECONDS:.0f} s: share of the time",
        "<= 5 %",
        f"{share:.2%} ({seconds:.1f} s a save)",
    )
    whole = 12 * 8e9 / rate
    say(
        "  8B at the same bytes a second, by one process",
        "",
        f"{whole / (whole + run.SAVE_SECONDS):.1%} ({whole:.0f} s at {rate / 1e6:,.0f} MB/s)",
    )


def _processes(root: Path) -> None:
    alone = losses(root, "one", {}, 1)
    for how in ("none", "full"):
        together = losses(root, f"two-{how}", {"sharding": how}, 2)
        worst = max(abs(b / a - 1) for a, b in zip(alone, together, strict=True))
        say(f"two processes, sharding: {how}: loss against one, worst of {len(alone)} steps", "<= 1e-5", f"{worst:.1e}")


def _speeds(root: Path) -> None:
    found = {}
    for mode in MODES:
        words = [sys.executable, "-m", "benchmarks.training", "--measure", str(root), mode]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found[mode] = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(found.values()))
    for mode, one in found.items():
        ratios = (
            f"{one['speed'] / first['speed']:.2f}x the speed, {one['more'] / first['more']:.2f}x the memory of a step"
        )
        say(
            f"tokens a second, {mode}",
            "",
            f"{one['speed']:,.0f}; {one['padding']:.0%} padding; peak {one['peak']:,.0f} MiB; {ratios}",
        )


if __name__ == "__main__":
    main()
