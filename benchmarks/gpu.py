"""The same code on a GPU: ``python -m benchmarks.gpu``. Without one it says so and measures nothing. Takes about four minutes on an H100.

The fused loss (labels and one teacher, forward and backward) against torch with all logits at once, and against Liger if
``liger_kernel`` is installed; then a Llama-shaped student of 1B parameters through the trainer: the teacher's pass, SFT, and
knowledge fusion from the cache. Goals are for one H100 80 GB in bfloat16.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import small
from llmfusion.artifacts.store import Artifact
from llmfusion.fusion.distributions import HiddenStateDistribution, TeacherHead
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.teacher import load_teacher
from llmfusion.io.jsonl import write_jsonl
from llmfusion.models.batches import default_device
from llmfusion.models.loading import load_model
from llmfusion.teachers.capture import capture
from llmfusion.training.loop import Student, train
from tests.unit.stand_ins import artifact, job

STUDENT = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True, "vocab_size": 128_256,
}  # fmt: skip
SIZES = {"count": 128, "words": 900, "max_length": 2048, "batch_size": 16, "micro_batch_size": 4, "steps": 12}


@dataclass
class Case:
    """Inputs of the loss: student's and teacher's states and heads, the teacher's entropies as a cache tells them, and labels."""

    hidden: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    entropy: Tensor
    labels: Tensor


def case(n: int, vocabulary: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """Random states and heads of deviation 1 and 0.02."""
    torch.manual_seed(0)
    states = [torch.randn(n, width, device=device, dtype=dtype) for _ in range(2)]
    heads = [torch.randn(vocabulary, width, device=device, dtype=dtype) * 0.02 for _ in range(2)]
    labels = torch.randint(0, vocabulary, (n,), device=device)
    said = ((part @ heads[1].T).float().log_softmax(-1) for part in states[1].split(256))
    entropy = torch.cat([-torch.linalg.vecdot(log_q.exp(), log_q) for log_q in said])
    return Case(states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], entropy, labels)


def ours(given: Case) -> Tensor:
    """Half SFT, half knowledge fusion, summed over rows."""
    one = given.labels.new_ones(len(given.labels), dtype=torch.float32)
    vocabulary = len(given.teacher_head)
    own = TeacherHead(given.teacher_head, None, torch.arange(vocabulary, device=one.device), vocabulary)
    teacher = HiddenStateDistribution(given.teacher, own, given.entropy, one, one)
    return fused_loss(
        given.hidden, given.head, None, given.labels, [teacher], one[:, None], 0.5, matmul_dtype=given.hidden.dtype
    ).loss


def plain(given: Case) -> Tensor:
    """The same by autograd through all logits."""
    logits = (given.hidden @ given.head.T).float()
    log_q = functional.log_softmax((given.teacher @ given.teacher_head.T).float(), dim=-1)
    kl = functional.kl_div(functional.log_softmax(logits, dim=-1), log_q, log_target=True, reduction="sum")
    return 0.5 * functional.cross_entropy(logits, given.labels, reduction="sum") + 0.5 * kl


def liger() -> Callable[[Case], Tensor] | None:
    """Liger's distillation loss (beta 0: the forward KL; compiled) on the same inputs, if it is installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=True)

    def call(given: Case) -> Tensor:
        found = loss(given.hidden, given.head, given.teacher, given.teacher_head, given.labels)
        return found[0] if isinstance(found, tuple) else found

    return call


def cost(loss: Callable[[Case], Tensor], given: Case, repeats: int = 5) -> tuple[float, float]:
    """Milliseconds of forward and backward (best of some), and GB at the peak beyond the inputs and their gradients."""
    took = []
    for _ in range(repeats + 1):
        given.hidden.grad = given.head.grad = None
        _sync()
        _reset_peak()
        before, began = _allocated(), time.perf_counter()
        loss(given).backward()
        _sync()
        took.append((time.perf_counter() - began) * 1e3)
    gradients = sum(t.numel() * t.element_size() for t in (given.hidden, given.head))
    return min(took[1:]), max(0.0, _peak() - before - gradients) / 1e9


def throughputs(
    root: Path, shape: dict[str, Any], sizes: dict[str, int], precision: str
) -> dict[str, dict[str, float]]:
    """Tokens a second (and MFU) of the teacher's pass, of SFT, and of knowledge fusion from the cache."""
    words = sizes["words"]
    mix, tokenizer, model = _pieces(root, small.samples(sizes["count"], words, words), shape, sizes["max_length"])
    pivot = small.checkpoint(root, "pivot", model, tokenizer)
    part = small.samples(sizes["count"] // 4, words, words)
    fewer = small.published(
        root,
        "data/mix/fewer",
        {"max_length": sizes["max_length"], "samples": len(part)},
        lambda folder: write_jsonl(folder / "samples.jsonl", part),
    )
    passes = [
        _passed(root / f"cache-{i}", pivot, given, {"dtype": precision, "batch_size": sizes["micro_batch_size"]})
        for i, given in enumerate((fewer, mix))
    ]
    (rows, seconds, _), (all_rows, all_seconds, cache) = passes
    found = {
        "capture": {"tokens_per_second": (all_rows - rows) / max(all_seconds - seconds, 1e-9)}
    }  # without the start
    spec = {
        "steps": sizes["steps"],
        "lr": 1e-6,
        "precision": precision,
        **{key: sizes[key] for key in ("batch_size", "micro_batch_size")},
    }
    for name, fusion in (("sft", {}), ("knowledge fusion from the cache", {"target": "kd"})):
        sources = (
            [load_teacher("teacher", cache, tokenizer, model.config.vocab_size, default_device(), fusion)]
            if fusion
            else []
        )
        made = job(root, name=name.replace(" ", "-"))
        with small.every_step_recorded():
            train(made, Student(load_model(pivot, "float32"), tokenizer), {**spec, "fusion": fusion}, [mix], sources)
        timings = made.measured["training"]["timings"][2:]  # the first steps allocate
        seconds = sum(t["seconds"] for t in timings)
        found[name] = {
            key: sum(t[key] * t["seconds"] for t in timings) / seconds
            for key in ("tokens_per_second", "mfu")
            if key in timings[0]
        }
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _passed(place: Path, teacher: Artifact, mix: Artifact, spec: dict[str, Any]) -> tuple[int, float, Artifact]:
    """Rows and seconds of a teacher's pass over a mix, and its cache."""
    place.mkdir()
    began = time.monotonic()
    facts = capture(teacher, mix, place, spec, None)
    return facts["rows"], time.monotonic() - began, artifact(place, **facts)


def main() -> int:
    """All measurements, where there is a GPU. Returns the exit status."""
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"fused loss, N=8192 V=128256 d=4096 bfloat16, forward and backward: {'':8} goal <= 70 ms (stretch 60), <= 5 GB"
    )
    peer = liger()
    for name, loss in (("ours", ours), *([("Liger, compiled", peer)] if peer else []), ("torch, all logits", plain)):
        try:
            milliseconds, peak = cost(loss, case(8192, 128_256, 4096, torch.bfloat16, "cuda"))
            print(f"  {name:20} {milliseconds:8.1f} ms {peak:6.2f} GB beyond inputs and gradients", flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"  {name:20} out of memory", flush=True)
        torch.cuda.empty_cache()
    if peer is None:
        print("  Liger is not installed (pip install liger-kernel)")
    goals = {"capture": ">= 100K", "sft": ">= 40K", "knowledge fusion from the cache": ">= 36K, stretch 40K"}
    with tempfile.TemporaryDirectory(prefix="llmfusion-gpu-") as name:
        for what, found in throughputs(Path(name), STUDENT, SIZES, "bfloat16").items():
            mfu = f", MFU {found['mfu']:.0%}" if "mfu" in found else ""
            print(
                f"1B student, {what}: {found['tokens_per_second']:,.0f} tokens/s{mfu} (goal {goals[what]})", flush=True
            )
    return 0


def _pieces(root: Path, texts: list[dict[str, Any]], shape: dict[str, Any], max_length: int) -> tuple[Any, Any, Any]:
    """The shape may have more rows than the tokenizer has tokens: nobody trains 128K tokens on generated words."""
    rows = shape.get("vocab_size", 0)
    mix, tokenizer, model = small.pieces(
        root, texts, {key: value for key, value in shape.items() if key != "vocab_size"}, 4096, max_length
    )
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return mix, tokenizer, model


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    sys.exit(main())
