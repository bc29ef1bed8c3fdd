"""The training loop: batches, the fused loss, clipping, the optimizer, resume state, metrics."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfusion.artifacts import Artifact
from llmfusion.data.chat import Encoded
from llmfusion.errors import UserError
from llmfusion.fusion.losses import FusedLoss, fused_loss
from llmfusion.fusion.sources import Source
from llmfusion.fusion.targets import TARGETS, Stats
from llmfusion.models.batches import device_of, label_rows, pad
from llmfusion.step import Job
from llmfusion.training import checkpoint
from llmfusion.training.corpus import Corpus
from llmfusion.training.optim import CautiousAdamW, learning_rate

SAVE_SECONDS = 900.0  # also the most a killed job can lose
RECORD_EVERY = 10


@dataclass
class Trainee:
    """The student: its model and tokenizer."""

    model: Any
    tokenizer: Any


def train(job: Job, trainee: Trainee, spec: dict[str, Any], mixes: Sequence[Artifact], teachers: Sequence[Source]) -> dict[str, Any]:
    """Train ``trainee.model`` in place as ``spec`` says. Returns facts; ``metrics.jsonl`` goes into the job's folder.

    Stops within a step at a loss that is not finite (:class:`UserError`, nothing published). SIGTERM and the end of the
    job's minutes save the resume state and end the process with status 143; the next start goes on bit for bit.
    """
    torch.use_deterministic_algorithms(True)
    corpus = Corpus(mixes, trainee.tokenizer)
    steps = corpus.steps(spec)
    loop = _Loop(job, trainee, spec, corpus, teachers, steps)
    loop.run()
    with open(job.folder / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in loop.records)
    return {
        "steps": steps,
        "samples": len(corpus),
        "rejected": corpus.rejected.facts(),
        "label_tokens": sum(map(_labels, corpus.encoded)),
        "loss": loop.records[-1]["loss"],
    }


def _labels(encoded: Encoded) -> int:
    return sum(encoded.is_label)


class _Loop:
    def __init__(self, job: Job, trainee: Trainee, spec: dict[str, Any], corpus: Corpus, teachers: Sequence[Source], steps: int):
        self.job, self.spec, self.corpus, self.teachers, self.steps = job, spec, corpus, teachers, steps
        self.device = device_of()
        self.model = trainee.model.float().to(self.device).train()
        self.fusion = spec.get("fusion", {})
        self.optimizer = CautiousAdamW(
            self.model.parameters(), spec["lr"], tuple(spec.get("betas", (0.9, 0.999))), spec.get("eps", 1e-6), spec.get("weight_decay", 0.01),
            spec.get("optimizer", "c_adamw") == "c_adamw", spec.get("cautious_norm", "mean_clamp"),
        )  # fmt: skip
        self.records: list[dict[str, Any]] = []
        self.stop = False
        self.began = self.saved = time.monotonic()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        torch.manual_seed(self.spec.get("seed", 42))
        state = self.job.work / "state"
        first, self.records = checkpoint.restore(state, self.job.key, self.model, self.optimizer)
        if first:
            print(f"going on after step {first} of {self.steps}", flush=True)
        for step, numbers in self.corpus.batches(self.spec, first, self.steps):
            self._step(step, numbers)
            if self._must_save() and step + 1 < self.steps:
                checkpoint.save(state, step + 1, self.job.key, self.model, self.optimizer, self.records)
                self.saved = time.monotonic()
                if self.stop:
                    print(f"stopped after step {step + 1} of {self.steps}; the state is saved in {state}", flush=True)
                    sys.exit(143)

    def _ask_to_stop(self, *_: object) -> None:
        self.stop = True

    def _must_save(self) -> bool:
        now = time.monotonic()
        if self.job.minutes is not None and now - self.began > self.job.minutes * 60 - 30:
            self.stop = True
        return self.stop or now - self.saved > SAVE_SECONDS

    def _step(self, step: int, numbers: list[int]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.spec["lr"], self.spec.get("lr_min", 0.0), self.spec.get("warmup", 0.0))
        tokens = sum(_labels(self.corpus.encoded[i]) for i in numbers)
        size = self.spec.get("micro_batch_size") or len(numbers)
        sums: dict[str, Any] = {}
        for start in range(0, len(numbers), size):
            result, weight, usable = self._micro(numbers[start : start + size])
            (result.loss / tokens).backward()
            _accumulate(sums, result, weight, usable)
        self._check_finite(step, numbers, float(sums["loss"]))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.get("clip_norm", 1.0))
        self._check_finite(step, numbers, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if step % RECORD_EVERY == 0 or step + 1 == self.steps:
            self._record(step, tokens, sums, float(norm))

    def _micro(self, numbers: list[int]) -> tuple[FusedLoss, Tensor, Tensor]:
        """The loss of some samples, and per teacher the summed weights and the number of usable rows."""
        encoded = [self.corpus.encoded[i] for i in numbers]
        ids, attention = pad([e.ids for e in encoded], self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.spec.get("precision") == "bfloat16"):
            hidden = self.model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
        places = [i * hidden.shape[1] + at for i, e in enumerate(encoded) for at in label_rows(e)]
        rows = hidden.flatten(0, 1)[torch.tensor(places, device=self.device)].float()  # (N, d), responses in order
        labels = torch.tensor([y for e in encoded for y in e.label_ids], device=self.device)
        head = self.model.get_output_embeddings()
        teachers = [t.batch([self.corpus.ids[i] for i in numbers], [e.label_ids for e in encoded]) for t in self.teachers]
        if not teachers:
            return fused_loss(rows, head.weight, head.bias, labels), rows.new_zeros(0), rows.new_zeros(0)
        stats = self._stats(teachers, encoded)
        weights = TARGETS[self.fusion["target"]](stats, self.fusion)
        lam, temperature = self.fusion.get("lambda", 0.5), self.fusion.get("temperature", 1.0)
        return fused_loss(rows, head.weight, head.bias, labels, teachers, weights, lam, temperature), weights.sum(0), stats.mask.sum(0)

    def _stats(self, teachers: list[Any], encoded: list[Encoded]) -> Stats:
        sequence = torch.repeat_interleave(torch.arange(len(encoded)), torch.tensor([_labels(e) for e in encoded])).to(self.device)
        entropy, cross_entropy, mask = (torch.stack([getattr(t, name) for t in teachers], 1) for name in ("entropy", "cross_entropy", "mask"))
        return Stats(entropy, cross_entropy, mask, sequence)

    def _check_finite(self, step: int, numbers: list[int], value: float) -> None:
        if not torch.isfinite(torch.tensor(value)):
            names = ", ".join(self.corpus.ids[i][:12] for i in numbers)
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(f"step {step + 1} of {self.steps}: loss or gradient is {value} at learning rate {rate:.3g}; samples {names}. Nothing was published")

    def _record(self, step: int, tokens: int, sums: dict[str, Any], norm: float) -> None:
        record = {
            "step": step + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "loss": float(sums["loss"]) / tokens,
            "sft": float(sums["sft"]) / tokens,
        }
        if self.teachers:
            names = [t.name for t in self.teachers]
            record["fusion"] = float(sums["fusion"]) / tokens
            record["weight"] = dict(zip(names, (sums["weight"] / tokens).tolist(), strict=True))
            record["usable"] = dict(zip(names, (sums["usable"] / tokens).tolist(), strict=True))
            record["student_cross_entropy"] = dict(zip(names, (sums["cross"] / tokens).tolist(), strict=True))
        self.records.append(record)
        if step % 100 == 0 or step + 1 == self.steps:
            print(f"step {step + 1}/{self.steps} loss {record['loss']:.4f} lr {record['lr']:.3g} {(time.monotonic() - self.began):.0f} s", flush=True)


def _accumulate(sums: dict[str, Any], result: FusedLoss, weight: Tensor, usable: Tensor) -> None:
    cross = result.cross_entropy.sum(0)
    parts = {"loss": result.loss.detach(), "sft": result.sft, "fusion": result.fusion, "cross": cross, "weight": weight, "usable": usable}
    for name, value in parts.items():
        sums[name] = sums[name] + value if name in sums else value
