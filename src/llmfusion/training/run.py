"""The training loop: batches, the objective, clipping, the optimizer, resume state, metrics."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfusion.artifacts import Artifact
from llmfusion.errors import UserError
from llmfusion.fusion.dskd import StudentTokens
from llmfusion.fusion.objective import Objective, Totals, add_records
from llmfusion.fusion.sources import Drawn, Source
from llmfusion.models.batches import device_of, label_rows, pad
from llmfusion.step import Job
from llmfusion.training import checkpoint, distributed
from llmfusion.training.corpus import Corpus, read_ahead
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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older versions of torch ask for it on GPUs
    torch.use_deterministic_algorithms(True)
    # a help for finding defects that costs 5 % of the time; no operation used here reads memory it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    corpus = Corpus(mixes, trainee.tokenizer)
    steps = corpus.steps(spec)
    loop = _Loop(job, trainee, spec, corpus, teachers, steps)
    loop.run()
    if distributed.rank() == 0:
        with open(job.folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in loop.records)
    return {
        "steps": steps,
        "samples": len(corpus),
        "rejected": corpus.rejected.facts(),
        "label_tokens": sum(len(d.encoded.label_ids) for d in corpus.drawn),
        "loss": loop.records[-1]["loss"],
    }


class _Loop:
    def __init__(self, job: Job, trainee: Trainee, spec: dict[str, Any], corpus: Corpus, teachers: Sequence[Source], steps: int):
        self.job, self.spec, self.corpus, self.steps = job, spec, corpus, steps
        self.device = device_of()
        self.model = trainee.model.float().to(self.device).train()
        torch.manual_seed(spec.get("seed", 42))
        fusion = spec.get("fusion", {})
        self.objective = Objective(fusion, teachers, self.model.get_output_embeddings().weight.shape[1]).to(self.device)
        self.trained = nn.ModuleDict({"student": self.model, "objective": self.objective})
        self.projector_rate = fusion.get("projector_lr", 1e-3) / spec["lr"] if spec["lr"] else 0.0
        groups = [{"params": list(part.parameters()), "rate": rate} for part, rate in ((self.model, 1.0), (self.objective, self.projector_rate))]
        self.optimizer = CautiousAdamW(
            [group for group in groups if group["params"]], spec["lr"], tuple(spec.get("betas", (0.9, 0.999))), spec.get("eps", 1e-6),
            spec.get("weight_decay", 0.01), spec.get("optimizer", "c_adamw") == "c_adamw", spec.get("cautious_norm", "mean_clamp"),
        )  # fmt: skip
        self.records: list[dict[str, Any]] = []
        self.asked = self.stop = False  # a signal asks this process; to stop is what all processes have agreed on
        self.saved = time.monotonic()
        self.reserve = Reserve(sum(p.numel() for p in self.trained.parameters()))

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        self.job.begins()
        state = self.job.work / "state"
        found = distributed.first_then_others(lambda: checkpoint.restore(state, self.job.key, self.trained, self.optimizer))
        first = -1 if found is None else found[0]
        if not distributed.same(first):
            raise UserError(f"{state}: the processes of this training read different states ({first} steps here); remove the folder to begin anew")
        if found is not None:
            self.records = found[1]
            _say(f"going on after step {first} of {self.steps}")
        elif self._prepare_projectors():
            self._save(state, -1)  # before the first step
        batches = self.corpus.batches(self.spec, max(first, 0), self.steps)
        for step, numbers in read_ahead(batches, self.corpus, self.objective.sources):
            with self.reserve.step():
                self._step(step, numbers)
            if self._must_save() and step + 1 < self.steps:
                self._save(state, step)

    def _save(self, state: Path, step: int) -> None:
        """Save after ``step``, and end the process if it was asked to; the others wait, or torchrun would take the first for left behind."""
        with self.reserve.save():
            if distributed.rank() == 0:
                checkpoint.save(state, step + 1, self.job.key, self.trained, self.optimizer, self.records)
            [asked] = distributed.any_of(self.asked)  # also meanwhile
        self.saved = time.monotonic()
        if self.stop or asked:
            _say(f"stopped after step {step + 1} of {self.steps}; the state is saved in {state}")
            sys.exit(143)

    def _prepare_projectors(self) -> int:
        """Steps for the projectors alone, over batches of their own: projections of random states would wreck the student. Returns their number."""
        steps = self.objective.fusion.get("projector_steps", 0) if len(self.objective.projectors) else 0
        self._set_rate(self.spec["lr"])
        seed = -1 - self.spec.get("seed", 42)
        for step, numbers in self.corpus.batches({**self.spec, "seed": seed}, 0, steps):
            distributed.seed_step(seed, step)
            for drawn, totals in self._micro_batches(numbers):
                with torch.no_grad():
                    student = self._student(drawn)
                self.objective.projection(student, drawn, totals).backward()
            self._update(partial(self._check_finite, -1, numbers))  # told as step 0
            [self.stop] = distributed.any_of(self.asked)
            if self.stop:
                _say("stopped while the projectors were prepared; they are begun again")
                sys.exit(143)
        return steps

    def _ask_to_stop(self, *_: object) -> None:
        self.asked = True

    def _must_save(self) -> bool:
        over = self.job.minutes is not None and self.job.elapsed() > self.job.minutes * 60 - self.reserve.seconds(self.job.minutes)
        self.stop, late = distributed.any_of(self.asked or over, time.monotonic() - self.saved > SAVE_SECONDS)
        return self.stop or late

    def _step(self, step: int, numbers: list[int]) -> None:
        self._set_rate(learning_rate(step, self.steps, self.spec["lr"], self.spec.get("lr_min", 0.0), self.spec.get("warmup", 0.0)))
        distributed.seed_step(self.spec.get("seed", 42), step)
        sums: dict[str, Any] = {}
        for drawn, totals in self._micro_batches(numbers):
            loss, record = self.objective(self._student(drawn), drawn, totals)
            loss.backward()
            add_records(sums, record)
        sums = distributed.sum_records(sums)
        self._check_finite(step, numbers, sums["loss"])
        norm = self._update(partial(self._check_finite, step, numbers))
        if step % RECORD_EVERY == 0 or step + 1 == self.steps:
            self._record(step, {**sums, "grad_norm": norm})

    def _micro_batches(self, numbers: list[int]) -> Iterator[tuple[Sequence[Drawn], Totals]]:
        drawn: Sequence[Drawn] = [self.corpus.drawn[i] for i in numbers]
        totals, drawn = self.objective.totals(drawn), distributed.part(drawn)  # counts of the whole step, samples of this process
        size = self.spec.get("micro_batch_size") or len(drawn)
        for start in range(0, len(drawn), size):
            yield drawn[start : start + size], totals

    def _student(self, drawn: Sequence[Drawn]) -> StudentTokens:
        """The student's final states at the label rows of some samples."""
        ids, attention = pad([d.encoded.ids for d in drawn], self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.spec.get("precision") == "bfloat16"):
            hidden = self.model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
        places = torch.tensor([i * hidden.shape[1] + at for i, d in enumerate(drawn) for at in label_rows(d.encoded)], device=self.device)
        labels = [d.encoded.label_ids for d in drawn]
        flat = torch.tensor([y for sample in labels for y in sample], device=self.device)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        rows = hidden.flatten(0, 1)[places].float()  # (N, d), responses in order
        return StudentTokens(rows, ids.flatten()[places], flat, [len(y) for y in labels], embedding.weight, head.weight, head.bias)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    def _update(self, check: Callable[[float], None] = lambda norm: None) -> float:
        """Clip student and projectors, each by its own norm, and step. Returns the student's norm, which ``check`` sees first."""
        distributed.sum_gradients(self.trained.parameters())
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], self.spec.get("clip_norm", 1.0)) for group in self.optimizer.param_groups]
        for norm in norms:
            check(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norms[0])

    def _check_finite(self, step: int, numbers: list[int], value: float) -> None:
        if not math.isfinite(value):
            names = ", ".join(self.corpus.drawn[i].sample["id"][:12] for i in numbers)
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(f"step {step + 1} of {self.steps}: loss or gradient is {value} at learning rate {rate:.3g}; samples {names}. Nothing was published")

    def _record(self, step: int, measured: dict[str, Any]) -> None:
        self.records.append({"step": step + 1, "lr": self.optimizer.param_groups[0]["lr"], **measured})
        if step % 100 == 0 or step + 1 == self.steps:
            rate = self.records[-1]["lr"]
            _say(f"step {step + 1}/{self.steps} loss {measured['loss']:.4f} lr {rate:.3g} {self.job.elapsed():.0f} s")


class Reserve:
    """How long before the end of its time a job must begin to save: measured, and estimated until the first save."""

    START = 60.0  # seconds: a scheduler's clock runs while two Snakemakes start ahead of this process, and while it leaves
    BYTES_PER_SECOND = 2e8  # written and hashed, on a slow network disk

    def __init__(self, parameters: int):
        self.slowest_step, self.slowest_save = 0.0, 12 * parameters / self.BYTES_PER_SECOND
        self._measured = False

    def seconds(self, minutes: float) -> float:
        """For a job of ``minutes``: the start (a quarter of a short job's time), one more step, and a save, a fifth slower than ever."""
        return min(self.START, 15 * minutes) + 1.2 * (self.slowest_step + self.slowest_save)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step."""
        began = time.monotonic()
        yield
        self.slowest_step = max(self.slowest_step, time.monotonic() - began)

    @contextmanager
    def save(self) -> Iterator[None]:
        """Measure a save; the first one replaces the estimate, for which a resume state is weights and two moments in float32."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.slowest_save = max(self.slowest_save, took) if self._measured else took
        self._measured = True


def _say(text: str) -> None:
    """One line in the log, not one a process."""
    if distributed.rank() == 0:
        print(text, flush=True)
