"""The training loop: batches, the objective, clipping, the optimizer, resume state, metrics."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from llmfusion.models.loading import save_model
from llmfusion.step import Job
from llmfusion.training import checkpoint, distributed, sharding
from llmfusion.training.batching import Groups, micro_batches, padding
from llmfusion.training.corpus import Corpus, read_ahead
from llmfusion.training.optim import CautiousAdamW, clip, learning_rate, require_moving
from llmfusion.training.reserve import Reserve
from llmfusion.training.watch import Watch

SAVE_SECONDS = 900.0  # also the most a killed job can lose
RECORD_EVERY = 10


@dataclass
class Trainee:
    """The student: its model and tokenizer. Of a training that shards, processes but the first may give an empty model."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path, dtype: str) -> dict[str, Any]:
        """Save a complete checkpoint. All processes call; the first writes and gets the facts, the others get none."""
        model = sharding.whole(self.model, getattr(torch, dtype))
        return save_model(model, self.tokenizer, folder, dtype) if distributed.rank() == 0 else {}


def train(job: Job, trainee: Trainee, spec: dict[str, Any], mixes: Sequence[Artifact], teachers: Sequence[Source]) -> dict[str, Any]:
    """Train ``trainee.model`` as ``spec`` says. Returns facts; ``metrics.jsonl`` goes into the job's folder, times to its provenance.

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
    job.measured = {"training": {"peak_flops": loop.watch.peak, "timings": loop.timings}}
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
        self.states = _prepared(trainee, spec, self.device)
        self.model = trainee.model = self.states.model
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
        self.timings: list[dict[str, Any]] = []
        self.asked = self.stop = False  # a signal asks this process; to stop is what all processes have agreed on
        self.saved = time.monotonic()
        self.preparing = fusion.get("projector_steps", 0) if len(self.objective.projectors) else 0  # steps of the projectors alone
        parameters = sum(p.numel() for p in self.trained.parameters())
        self.reserve, self.watch = Reserve(parameters), Watch(steps, parameters)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        self.job.begins()
        state = self.job.work / "state"
        found = checkpoint.restore(state, self.job.key, self.trained, self.optimizer)
        done = 0 if found is None else found[0]
        if found is not None:
            self.records, self.timings = found[1]["records"], found[1]["timings"]
            _say(f"going on after step {done} of {self.preparing + self.steps}")
        self._prepare_projectors(state, done)
        first = max(0, done - self.preparing)
        self.watch.begin(first)
        batches = self.corpus.batches(self.spec, first, self.steps)
        for step, numbers in read_ahead(batches, self._own, self.objective.sources):
            with self.reserve.step():
                self._step(step, numbers)
            if self._must_save() and step + 1 < self.steps:
                self._save(state, step)
        self.watch.close()

    def _save(self, state: Path, step: int) -> None:
        """Save after ``step`` (those of the projectors alone are the ones before 0), and end the process if it was asked to; the others wait,
        or torchrun would take the first for left behind."""
        done = self.preparing + step + 1
        with self.reserve.save():
            notes = {"records": self.records, "timings": self.timings}
            checkpoint.save(state, done, self.job.key, self.trained, self.optimizer, notes)
            [asked] = distributed.any_of(self.asked)  # also meanwhile
        self.saved = time.monotonic()
        if self.stop or asked:
            self.watch.close()
            _say(f"stopped after step {done} of {self.preparing + self.steps}; the state is saved in {state}")
            sys.exit(143)

    def _prepare_projectors(self, state: Path, done: int) -> None:
        """Steps for the projectors alone, over batches of their own: projections of random states would wreck the student. ``done`` were made before."""
        self._set_rate(self.spec["lr"])
        seed = -1 - self.spec.get("seed", 42)
        for step, numbers in self.corpus.batches({**self.spec, "seed": seed}, done, self.preparing):
            with self.reserve.step():
                distributed.seed_step(seed, step)
                for drawn, totals in self._micro_batches(numbers):
                    with torch.no_grad():
                        student = self._student(drawn)
                    self.objective.projection(student, drawn, totals).backward()
                self._update(partial(self._check_finite, -1, numbers))  # told as step 0
            if self._must_save() or step + 1 == self.preparing:
                sharding.rest(self.states)
                self._save(state, step - self.preparing)

    def _ask_to_stop(self, *_: object) -> None:
        self.asked = True

    def _must_save(self) -> bool:
        over = self.job.minutes is not None and self.job.elapsed() > self.job.minutes * 60 - self.reserve.seconds(self.job.minutes)
        self.stop, late = distributed.any_of(self.asked or over, time.monotonic() - self.saved > SAVE_SECONDS)
        return self.stop or late

    def _step(self, step: int, numbers: list[int]) -> None:
        spec = self.spec
        self._set_rate(learning_rate(step, self.steps, spec["lr"], spec.get("lr_min", 0.0), spec.get("warmup", 0.0), spec.get("schedule", "cosine")))
        distributed.seed_step(spec.get("seed", 42), step)
        sums: dict[str, Any] = {}
        with self.watch.step(*self._places(numbers)):
            for drawn, totals in self._micro_batches(numbers):
                loss, record = self.objective(self._student(drawn), drawn, totals)
                loss.backward()
                add_records(sums, record)
            sums = distributed.sum_records(sums)
            self._check_finite(step, numbers, sums["loss"])
            norm = self._update(partial(self._check_finite, step, numbers))
        self.watch.tell(step + 1, sums["loss"], self.optimizer.param_groups[0]["lr"])
        if step % RECORD_EVERY == 0 or step + 1 == self.steps:
            self.records.append({"step": step + 1, "lr": self.optimizer.param_groups[0]["lr"], **sums, "grad_norm": norm})
            self.timings.append(self.watch.timing(step + 1))

    def _cuts(self, numbers: list[int]) -> tuple[list[int], list[Groups]]:
        """Lengths of a step's samples, and each process's micro-batches of them."""
        lengths = [len(self.corpus.drawn[i].encoded.ids) for i in numbers]
        return lengths, micro_batches(lengths, distributed.count(), self.spec.get("micro_batch_size"), self.spec.get("micro_batch_tokens"))

    def _own(self, numbers: list[int]) -> list[Drawn]:
        """This process's samples of a step."""
        return [self.corpus.drawn[numbers[i]] for group in self._cuts(numbers)[1][distributed.rank()] for i in group]

    def _places(self, numbers: list[int]) -> tuple[int, int]:
        """Tokens of a step, and padded places, in all processes."""
        lengths, cuts = self._cuts(numbers)
        return sum(lengths), sum(padding(lengths, groups) for groups in cuts)

    def _micro_batches(self, numbers: list[int]) -> Iterator[tuple[Sequence[Drawn], Totals]]:
        """This process's samples, with the counts of the whole step."""
        drawn = [self.corpus.drawn[i] for i in numbers]
        totals, groups = self.objective.totals(drawn), self._cuts(numbers)[1][distributed.rank()]
        for group in groups:
            sharding.next_backward(self.states, last=group is groups[-1])
            yield [drawn[i] for i in group], totals

    def _student(self, drawn: Sequence[Drawn]) -> StudentTokens:
        """The student's final states at the label rows of some samples."""
        ids, attention = pad([d.encoded.ids for d in drawn], self.device)
        low, whole = self.spec.get("precision") == "bfloat16", self.spec.get("sharding", "none") == "none"
        with torch.autocast(self.device, torch.bfloat16, enabled=low, cache_enabled=whole):  # a cache would keep all layers of a sharded model
            hidden = self.states(ids, attention)  # (B, T, d)
        places = torch.tensor([i * hidden.shape[1] + at for i, d in enumerate(drawn) for at in label_rows(d.encoded)], device=self.device)
        labels = [d.encoded.label_ids for d in drawn]
        flat = torch.tensor([y for sample in labels for y in sample], device=self.device)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        rows = hidden.flatten(0, 1)[places].float()  # (N, d), responses in order
        sizes, products = [len(y) for y in labels], torch.bfloat16 if low else None
        return StudentTokens(rows, ids.flatten()[places], flat, sizes, embedding.weight, head.weight, head.bias, products)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    def _update(self, check: Callable[[float], None] = lambda norm: None) -> float:
        """Clip student and projectors, each by its own norm, and step. Returns the student's norm, which ``check`` sees first."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        distributed.sum_gradients(p for group in groups for p in group if not sharding.is_part(p))
        norms = [clip(group, self.spec.get("clip_norm", 1.0)) for group in groups]
        for norm in norms:
            check(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms[0]

    def _check_finite(self, step: int, numbers: list[int], value: float) -> None:
        if not math.isfinite(value):
            names = ", ".join(self.corpus.drawn[i].sample["id"][:12] for i in numbers)
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(f"step {step + 1} of {self.steps}: loss or gradient is {value} at learning rate {rate:.3g}; samples {names}. Nothing was published")


def _prepared(trainee: Trainee, spec: dict[str, Any], device: str) -> sharding.States:
    """The student in its precision, on its device or devices, ready to train."""
    model, dtype = trainee.model, getattr(torch, spec.get("parameters", "float32"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.bfloat16 and model.device.type != "meta":
        require_moving(model, spec["lr"])
    if spec.get("activation_checkpointing"):
        sharding.layers_of(model)
    states = sharding.shard(model) if spec.get("sharding") == "full" else sharding.States(model.to(device))
    if spec.get("activation_checkpointing"):
        enable = getattr(states.model, "activation_checkpointing_enable", None) or states.model.gradient_checkpointing_enable  # the older name
        enable({"use_reentrant": False})
    return states.train()


def _say(text: str) -> None:
    """One line in the log, not one a process."""
    if distributed.rank() == 0:
        print(text, flush=True)
