"""The same code on a GPU: ``python -m benchmarks.gpu``. Four minutes on an H100; without a GPU, it measures nothing.

The fused loss (labels and one teacher, forward and backward) against torch with all logits at once, and against Liger
if ``liger_kernel`` is installed; then a Llama-shaped student of 1B parameters through the trainer: the teacher's
pass, SFT, and knowledge fusion from the cache. Goals are for one H100 80 GB in bfloat16.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from llmfusion.study.schema.settings import Capture
from llmfusion.study.schema.training import TrainedModel
from llmfusion.teachers.capture import capture
from llmfusion.training.loop import Student, TrainingResult, train
from tests.unit.stand_ins import artifact

STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "vocab_size": 128_256,
}
SIZES = {"count": 128, "words": 900, "max_length": 2048, "batch_size": 16, "micro_batch_size": 4, "steps": 12}


@dataclass
class Case:
    """Inputs of the loss: student's and teacher's states and heads, the teacher's entropies as cached, and labels."""

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
    log_probs = ((part @ heads[1].T).float().log_softmax(-1) for part in states[1].split(256))
    entropy = torch.cat([-torch.linalg.vecdot(log_q.exp(), log_q) for log_q in log_probs])
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
        result = loss(given.hidden, given.head, given.teacher, given.teacher_head, given.labels)
        return result[0] if isinstance(result, tuple) else result

    return call


def cost(loss: Callable[[Case], Tensor], given: Case, repeats: int = 5) -> tuple[float, float]:
    """Milliseconds of forward and backward (best of some), and GB at the peak beyond inputs and their gradients."""
    milliseconds = []
    for _ in range(repeats + 1):
        given.hidden.grad = given.head.grad = None
        _sync()
        _reset_peak()
        before = _allocated()
        began = time.perf_counter()
        loss(given).backward()
        _sync()
        milliseconds.append((time.perf_counter() - began) * 1e3)
    gradients = sum(t.numel() * t.element_size() for t in (given.hidden, given.head))
    return min(milliseconds[1:]), max(0.0, _peak() - before - gradients) / 1e9


def throughputs(
    root: Path, shape: dict[str, Any], sizes: dict[str, int], precision: Literal["float32", "bfloat16"]
) -> dict[str, dict[str, float]]:
    """Tokens a second (and MFU) of the teacher's pass, of SFT, and of knowledge fusion from the cache."""
    words = sizes["words"]
    mix, tokenizer, model = _pieces(root, small.samples(sizes["count"], words, words), shape, sizes["max_length"])
    pivot = small.checkpoint(root, "pivot", model, tokenizer)
    settings = Capture(dtype=precision, batch_size=sizes["micro_batch_size"])
    fewer = _published_mix(root, "fewer", small.samples(sizes["count"] // 4, words, words), sizes["max_length"])
    rows, seconds, _ = _captured(root / "cache-0", pivot, fewer, settings)
    all_rows, all_seconds, cache = _captured(root / "cache-1", pivot, mix, settings)
    # the difference of two passes: without the start
    results = {"capture": {"tokens_per_second": (all_rows - rows) / max(all_seconds - seconds, 1e-9)}}
    fused = {"teachers": ["base/teacher"], "fusion": {"target": "kd"}}
    for name, options in (("sft", {}), ("knowledge fusion from the cache", fused)):
        student = Student(load_model(pivot, "float32"), tokenizer)
        run = _run(sizes, precision, options)
        results[name] = _mean_timing(_training(root / name.replace(" ", "-"), student, run, mix, cache))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def _run(sizes: dict[str, int], precision: str, options: dict[str, Any]) -> TrainedModel:
    numbers = {key: sizes[key] for key in ("steps", "batch_size", "micro_batch_size")}
    same = {"init": "base/pivot", "mix": "m", "lr": 1e-6, "precision": precision}
    return TrainedModel.model_validate({**same, **numbers, **options})


def _training(folder: Path, student: Student, run: TrainedModel, mix: Artifact, cache: Artifact) -> TrainingResult:
    """A training with a timing of each step, with the cached teacher if the run has one."""
    vocabulary_size = student.model.config.vocab_size
    teachers = [
        load_teacher(name, cache, student.tokenizer, vocabulary_size, default_device(), run.fusion)
        for name in run.teachers
        if run.fusion is not None
    ]
    with small.every_step_recorded():
        return train(student, run, run.fusion, [mix], teachers, folder, "benchmark")


def _mean_timing(result: TrainingResult) -> dict[str, float]:
    """Tokens a second, and MFU where it is known, over all steps but the first two, which allocate."""
    timings = result.measured["timings"][2:]
    seconds = sum(t["seconds"] for t in timings)
    names = [name for name in ("tokens_per_second", "mfu") if name in timings[0]]
    return {name: sum(t[name] * t["seconds"] for t in timings) / seconds for name in names}


def _captured(folder: Path, teacher: Artifact, mix: Artifact, settings: Capture) -> tuple[int, float, Artifact]:
    """Rows and seconds of a teacher's pass over a mix, and its cache."""
    folder.mkdir()
    began = time.monotonic()
    facts = capture(teacher, mix, folder, settings, None)
    return facts["rows"], time.monotonic() - began, artifact(folder, **facts)


def main() -> int:
    """All measurements, where there is a GPU. Returns the exit status."""
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    _report_losses()
    _report_throughputs()
    return 0


def _report_losses() -> None:
    print("fused loss, N=8192 V=128256 d=4096 bfloat16, forward and backward: goal <= 70 ms (stretch 60), <= 5 GB")
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


def _report_throughputs() -> None:
    goals = {"capture": ">= 100K", "sft": ">= 40K", "knowledge fusion from the cache": ">= 36K, stretch 40K"}
    with tempfile.TemporaryDirectory(prefix="llmfusion-gpu-") as name:
        for what, measured in throughputs(Path(name), STUDENT, SIZES, "bfloat16").items():
            mfu = f", MFU {measured['mfu']:.0%}" if "mfu" in measured else ""
            speed = f"{measured['tokens_per_second']:,.0f} tokens/s{mfu}"
            print(f"1B student, {what}: {speed} (goal {goals[what]})", flush=True)


def _pieces(root: Path, texts: list[dict[str, Any]], shape: dict[str, Any], max_length: int) -> tuple[Any, Any, Any]:
    """The shape may have more rows than the tokenizer has tokens: nobody trains 128K tokens on generated words."""
    architecture = {key: value for key, value in shape.items() if key != "vocab_size"}
    mix, tokenizer, model = small.pieces(root, texts, architecture, 4096, max_length)
    if "vocab_size" in shape:
        model.resize_token_embeddings(shape["vocab_size"], mean_resizing=False)
    return mix, tokenizer, model


def _published_mix(root: Path, name: str, texts: list[dict[str, Any]], max_length: int) -> Artifact:
    facts = {"max_length": max_length, "samples": len(texts)}
    return small.published(root, f"data/mix/{name}", facts, lambda folder: write_jsonl(folder / "samples.jsonl", texts))


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
