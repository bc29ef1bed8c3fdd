"""The fused loss: CPU seconds and memory of forward and backward, against full logits and Liger's chunked loss.

``python -m benchmarks.losses`` measures every case in a process of its own, ours and the peers' in turn, and prints a
table of ratios with the goal of each. A peer gets the same inputs and computes the same loss and gradients, which is
checked. Memory is what a process grows by while it computes, gradients included. Liger is installed into a temporary
folder. Takes about seven minutes.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIGER = "liger-kernel==0.8.5"


@dataclass(frozen=True)
class Case:
    """N rows, vocabulary V, width d, K teachers of the same width, and the share of rows without a label."""

    rows: int
    vocabulary: int
    teachers: int
    width: int = 512
    ignored: float = 0.0
    target: str = "naive"  # weights 1; mince: one teacher a row


class Cost(NamedTuple):
    """CPU seconds and MiB of the best of some passes, and a number that all implementations must agree on."""

    seconds: float
    memory: float
    check: float


class Claim(NamedTuple):
    """A ratio and what it must not exceed."""

    name: str
    time: tuple[float, float] | None
    memory: tuple[float, float] | None


# ------------------------------------------------------------------------------------ one process, one measurement
def inputs(case: Case) -> tuple[Any, ...]:
    """Student's states and head, with gradients, teachers' states and heads, labels and weights; float32, seeded."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(case.rows, case.width)
    head = torch.randn(case.vocabulary, case.width) / case.width**0.5
    teachers = [
        (torch.randn(case.rows, case.width), torch.randn(case.vocabulary, case.width) / case.width**0.5)
        for _ in range(case.teachers)
    ]
    labels = torch.randint(case.vocabulary, (case.rows,))
    labels[torch.rand(case.rows) < case.ignored] = -100
    weights = torch.ones(case.rows, case.teachers)
    if case.target == "mince":
        weights = torch.nn.functional.one_hot(
            torch.arange(case.rows) * case.teachers // case.rows, case.teachers
        ).float()
    return hidden.requires_grad_(), head.requires_grad_(), teachers, labels, weights


def ours(case: Case) -> Callable[[], Any]:
    """This package's loss, over teachers as a cache gives them."""
    import torch

    from llmfusion.fusion.distributions import HiddenStateDistribution, TeacherHead
    from llmfusion.fusion.fused_loss import fused_loss

    hidden, head, teachers, labels, weights = inputs(case)
    zeros = torch.zeros(case.rows)
    distributions: list[Any] = []
    for states, matrix in teachers:
        teacher_head = TeacherHead(matrix, None, torch.arange(case.vocabulary), case.vocabulary)
        entropy = _entropy(states, matrix)  # as it is in a cache
        distributions.append(HiddenStateDistribution(states, teacher_head, entropy, zeros, zeros + 1))
    count = int((labels != -100).sum())

    def forward() -> Any:
        return fused_loss(hidden, head, None, labels, distributions, weights, fusion_weight=0.5, count=count).loss

    return lambda: _forward_and_backward(forward, hidden, head)


def _entropy(states: Any, matrix: Any) -> Any:
    """Entropy of a teacher at each row, (N,)."""
    import torch

    log_qs = ((part @ matrix.T).log_softmax(-1) for part in states.split(64))
    return torch.cat([-torch.linalg.vecdot(log_q.exp(), log_q) for log_q in log_qs])


def full(case: Case) -> Callable[[], Any]:
    """The same by autograd through (N, V) logits."""
    import torch
    from torch.nn import functional

    hidden, head, teachers, labels, weights = inputs(case)

    def forward() -> Any:
        logits = functional.linear(hidden, head)
        count = int((labels != -100).sum())
        loss = 0.5 * functional.cross_entropy(logits, labels, reduction="sum") / count
        log_p = functional.log_softmax(logits, -1)
        for k, (states, matrix) in enumerate(teachers):
            with torch.no_grad():
                log_q = functional.log_softmax(functional.linear(states, matrix), -1)
            kl = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            loss = loss + 0.5 * (kl * weights[:, k] * (labels != -100)).sum() / count
        return loss

    return lambda: _forward_and_backward(forward, hidden, head)


def liger(case: Case, chunk: int) -> Callable[[], Any]:
    """Liger's fused linear JSD at beta 0, which is the forward KL, not compiled: on CPU that needs a compiler."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    hidden, head, [(states, matrix)], labels, _ = inputs(case)
    loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=False, chunk_size=chunk)
    return lambda: _forward_and_backward(lambda: loss(hidden, head, states, matrix, labels), hidden, head)


def _forward_and_backward(forward: Callable[[], Any], hidden: Any, head: Any) -> Callable[[], float]:
    """Forward and backward, and how to get a number that depends on loss and gradients."""
    hidden.grad = head.grad = None
    loss = forward()
    loss.backward()
    return lambda: float(loss.detach()) + float(hidden.grad.norm()) + float(head.grad.norm())


IMPLEMENTATIONS: dict[str, Callable[[Case], Callable[[], Any]]] = {
    "ours": ours,
    "full": full,
    "liger, chunks of 1024": lambda case: liger(case, 1024),
    "liger, chunks of 256": lambda case: liger(case, 256),
}


def measure(name: str, case: Case, passes: int) -> Cost:
    """In this process: the least CPU time of some passes after a small one, and how far memory grew."""
    IMPLEMENTATIONS[name](Case(64, 512, case.teachers))()  # threads, oneDNN and MKL are there from here on
    run = IMPLEMENTATIONS[name](case)
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs took is given back, or it would be there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    seconds = []
    for _ in range(passes):
        began = time.process_time()
        check = run()
        seconds.append(time.process_time() - began)
    return Cost(min(seconds), (_status("VmHWM") - before) / 1024, check())


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


# -------------------------------------------------------------------------------------------------- the whole table
class Bench:
    """Measurements by implementation and case, each the best of some processes."""

    def __init__(self, packages: Path, repeats: int):
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{packages}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.repeats = repeats

    def compare(self, *pairs: tuple[str, Case]) -> list[Cost]:
        """Costs of implementations of one case, measured in turn."""
        measured: list[list[Cost]] = [[self._one(*pair) for pair in pairs] for _ in range(self.repeats)]
        best = [
            Cost(min(c.seconds for c in column), min(c.memory for c in column), column[0].check)
            for column in zip(*measured, strict=True)
        ]
        for (name, case), cost in zip(pairs, best, strict=True):
            print(f"  {name:22} {_describe(case):58} {cost.seconds:7.2f} CPU s {cost.memory:7.0f} MiB", flush=True)
        return best

    def _one(self, name: str, case: Case) -> Cost:
        words = [sys.executable, "-m", "benchmarks.losses", "--one", json.dumps([name, asdict(case)])]
        done = subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return Cost(*json.loads(done.stdout.splitlines()[-1]))


def _describe(case: Case) -> str:
    more = (f" {case.ignored:.0%} ignored" if case.ignored else "") + (
        f" {case.target}" if case.target != "naive" else ""
    )
    return f"N={case.rows} V={case.vocabulary} d={case.width} K={case.teachers}{more}"


def against(
    name: str, one: Cost, other: Cost, time_goal: float | None, memory_goal: float | None, same: bool = True
) -> Claim:
    """Ratios of two costs; refuses to compare what did not compute the same."""
    if same and abs(one.check - other.check) > 1e-3 * abs(other.check):
        raise SystemExit(f"{name}: the two do not agree: {one.check} and {other.check}")
    return Claim(
        name,
        time_goal and (one.seconds / other.seconds, time_goal),
        memory_goal and (one.memory / other.memory, memory_goal),
    )


def claims(bench: Bench) -> list[Claim]:
    """All of them, measured."""
    wide = Case(1024, 128256, 1)
    four = Case(1024, 32768, 4)
    one = Case(1024, 32768, 1)
    found: list[Claim] = []
    a, b = bench.compare(("ours", wide), ("full", wide))
    found.append(against("V=128256, K=1, against full logits", a, b, 0.8, 1 / 5))
    mince = Case(1024, 32768, 4, target="mince")
    a, b, c = bench.compare(("ours", four), ("full", four), ("ours", mince))
    found.append(against("V=32768, K=4 (naive, UDF), against full logits", a, b, 0.6, 1 / 7))
    found.append(against("V=32768, K=4, MinCE against naive", c, a, 0.6, None, same=False))
    a, b, c = bench.compare(("ours", one), ("liger, chunks of 1024", one), ("liger, chunks of 256", one))
    found += [
        against(f"V=32768, K=1, against Liger, chunks of {size}", a, peer, 0.75, 0.4)
        for size, peer in ((1024, b), (256, c))
    ]
    a, b, c = bench.compare(("ours", one), ("ours", Case(4096, 32768, 1)), ("ours", Case(1024, 32768, 1, ignored=0.6)))
    found.append(against("N=4096 against N=1024", b, a, None, 1.15, same=False))
    found.append(against("60 % of the rows ignored against none", c, a, 0.5, None, same=False))
    return found


def main() -> int:
    """Measure and print; status 1 where a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=2, help="processes for each measurement, of which the best counts"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, case = json.loads(arguments.one)
        print(json.dumps(measure(name, Case(**case), passes=3)))
        return 0
    with tempfile.TemporaryDirectory() as packages:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, LIGER], check=True
        )
        found = claims(Bench(Path(packages), arguments.repeats))
    print(f"\n{'':52} {'CPU time':>8} {'goal':>6} {'memory':>8} {'goal':>6}")
    for name, *ratios in found:
        print(f"{name:52}" + "".join(f" {r[0]:8.2f} {r[1]:6.2f}" if r else f" {'':8} {'':6}" for r in ratios))
    missed = [claim.name for claim in found for ratio in (claim.time, claim.memory) if ratio and ratio[0] > ratio[1]]
    print("all goals held" if not missed else f"goals missed: {'; '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
