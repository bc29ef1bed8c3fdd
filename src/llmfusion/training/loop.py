"""The training loop: batches, the objective, clipping, the optimizer, resume state, metrics."""

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

from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample
from llmfusion.errors import UserError
from llmfusion.fusion.objective import Objective, StepTokenCounts, add_records
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.teacher import Teacher
from llmfusion.models.batches import default_device, label_positions, pad
from llmfusion.models.loading import save_model
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.training import Training
from llmfusion.training import distributed, resume_state, sharding
from llmfusion.training.batching import Groups, micro_batches, padding
from llmfusion.training.corpus import Corpus, read_ahead
from llmfusion.training.optim import CautiousAdamW, clip_gradients, learning_rate, require_effective_updates
from llmfusion.training.progress import ProgressMeter
from llmfusion.training.save_deadline import SaveDeadline, TimeLimit

SAVE_SECONDS = 900.0  # also the most a killed job can lose
RECORD_EVERY = 10


@dataclass
class Student:
    """The student: its model and tokenizer. Of a training that shards, processes but the first may give an empty model."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path, dtype: str) -> dict[str, Any]:
        """Save a complete checkpoint. All processes call; the first writes and gets the facts, the others get none."""
        model = sharding.gather_full_model(self.model, getattr(torch, dtype))
        return save_model(model, self.tokenizer, folder, dtype) if distributed.rank() == 0 else {}


@dataclass(frozen=True)
class TrainingResult:
    """Facts for a manifest, the records of ``metrics.jsonl`` (the same at every run), and times, which are not."""

    facts: dict[str, Any]
    records: list[dict[str, Any]]
    measured: dict[str, Any]


def train(
    student: Student,
    run: Training,
    fusion: FusionOptions | None,
    mixes: Sequence[Artifact],
    teachers: Sequence[Teacher],
    state: Path,
    key: str,
    time_limit: TimeLimit | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Train ``student.model`` as ``run`` says, with ``fusion`` of the ``teachers`` where there are any.

    Resume states lie in the folder ``state`` and belong to ``key`` (one spec over the very content of its inputs). Stops within
    a step at a loss that is not finite (:class:`UserError`). SIGTERM and the end of the time limit save the resume state and end
    the process with status 143; the next call goes on bit for bit. ``on_start`` is called when everything is loaded.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older versions of torch ask for it on GPUs
    torch.use_deterministic_algorithms(True)
    # a help for finding defects that costs 5 % of the time; no operation used here reads memory it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    corpus = Corpus(mixes, student.tokenizer)
    steps = corpus.steps(run)
    loop = _Loop(student, run, fusion, corpus, teachers, steps, state, key, time_limit)
    on_start()
    loop.run()
    facts = {
        "steps": steps,
        "samples": len(corpus),
        "rejected": corpus.rejected.facts(),
        "label_tokens": sum(len(sample.encoded.label_ids) for sample in corpus.samples),
        "loss": loop.records[-1]["loss"],
    }
    return TrainingResult(facts, loop.records, {"peak_flops": loop.progress.peak, "timings": loop.timings})


class _Loop:
    def __init__(
        self,
        student: Student,
        run: Training,
        fusion: FusionOptions | None,
        corpus: Corpus,
        teachers: Sequence[Teacher],
        steps: int,
        state: Path,
        key: str,
        time_limit: TimeLimit | None,
    ):
        self.spec = run
        self.corpus = corpus
        self.steps = steps
        self.state = state
        self.key = key
        self.teachers = teachers
        self.time_limit = time_limit
        self.device = default_device()
        self.states = _prepared(student, run, self.device)
        self.model = student.model = self.states.model
        torch.manual_seed(run.seed)
        self.objective = Objective(fusion, teachers, self.model.get_output_embeddings().weight.shape[1]).to(self.device)
        self.trained = nn.ModuleDict({"student": self.model, "objective": self.objective})
        self.optimizer = CautiousAdamW(
            [{"params": list(self.model.parameters()), "rate": 1.0}, *self.objective.parameter_groups(run)],
            run.lr,
            (run.betas[0], run.betas[1]),
            run.eps,
            run.weight_decay,
            run.optimizer == "c_adamw",
            run.cautious_norm,
        )
        self.records: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.stop_requested = False  # a signal asks this process
        self.stop = False  # what all processes have agreed on
        self.saved = time.monotonic()
        self.preparing = (
            fusion.projector_steps if fusion and len(self.objective.projectors) else 0
        )  # steps of the projectors alone
        parameters = sum(p.numel() for p in self.trained.parameters())
        self.deadline = SaveDeadline(parameters)
        self.progress = ProgressMeter(steps, parameters)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        state = self.state
        found = resume_state.restore(state, self.key, self.trained, self.optimizer)
        done = 0 if found is None else found[0]
        if found is not None:
            self.records, self.timings = found[1]["records"], found[1]["timings"]
            _say(f"going on after step {done} of {self.preparing + self.steps}")
        self._prepare_projectors(state, done)
        first = max(0, done - self.preparing)
        self.progress.begin(first)
        batches = self.corpus.batches(self.spec, first, self.steps)
        for step, numbers in read_ahead(batches, self._own, self.teachers):
            with self.deadline.step():
                self._step(step, numbers)
            if self._must_save() and step + 1 < self.steps:
                self._save(state, step)
        self.progress.close()

    def _save(self, state: Path, step: int) -> None:
        """Save after ``step`` (those of the projectors alone are the ones before 0), and end the process if it was asked to; the others wait,
        or torchrun would take the first for left behind."""
        done = self.preparing + step + 1
        with self.deadline.save():
            notes = {"records": self.records, "timings": self.timings}
            resume_state.save(state, done, self.key, self.trained, self.optimizer, notes)
            [asked] = distributed.any_across_ranks(self.stop_requested)  # also meanwhile
        self.saved = time.monotonic()
        if self.stop or asked:
            self.progress.close()
            _say(f"stopped after step {done} of {self.preparing + self.steps}; the state is saved in {state}")
            sys.exit(143)

    def _prepare_projectors(self, state: Path, done: int) -> None:
        """Steps for the projectors alone, over batches of their own: projections of random states would wreck the student. ``done`` were made before."""
        self._set_rate(self.spec.lr)
        seed = -1 - self.spec.seed
        for step, numbers in self.corpus.batches(self.spec.model_copy(update={"seed": seed}), done, self.preparing):
            with self.deadline.step():
                distributed.seed_step(seed, step)
                for drawn, totals in self._micro_batches(numbers):
                    with torch.no_grad():
                        student = self._student(drawn)
                    self.objective.projector_loss(student, drawn, totals).backward()
                self._update(partial(self._check_finite, -1, numbers))  # told as step 0
            if self._must_save() or step + 1 == self.preparing:
                sharding.reshard(self.states)
                self._save(state, step - self.preparing)

    def _ask_to_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _must_save(self) -> bool:
        over = self.time_limit is not None and self.time_limit.seconds_left() < self.deadline.seconds(
            self.time_limit.minutes
        )
        self.stop, late = distributed.any_across_ranks(
            self.stop_requested or over, time.monotonic() - self.saved > SAVE_SECONDS
        )
        return self.stop or late

    def _step(self, step: int, numbers: list[int]) -> None:
        spec = self.spec
        self._set_rate(learning_rate(step, self.steps, spec.lr, spec.lr_min, spec.warmup, spec.schedule))
        distributed.seed_step(spec.seed, step)
        sums: dict[str, Any] = {}
        with self.progress.step(*self._places(numbers)):
            for drawn, totals in self._micro_batches(numbers):
                loss, record = self.objective(self._student(drawn), drawn, totals)
                loss.backward()
                add_records(sums, record)
            sums = distributed.sum_records(sums)
            self._check_finite(step, numbers, sums["loss"])
            norm = self._update(partial(self._check_finite, step, numbers))
        self.progress.tell(step + 1, sums["loss"], self.optimizer.param_groups[0]["lr"])
        if step % RECORD_EVERY == 0 or step + 1 == self.steps:
            self.records.append(
                {"step": step + 1, "lr": self.optimizer.param_groups[0]["lr"], **sums, "grad_norm": norm}
            )
            self.timings.append(self.progress.timing(step + 1))

    def _cuts(self, numbers: list[int]) -> tuple[list[int], list[Groups]]:
        """Lengths of a step's samples, and each process's micro-batches of them."""
        lengths = [len(self.corpus.samples[i].encoded.ids) for i in numbers]
        return lengths, micro_batches(
            lengths, distributed.world_size(), self.spec.micro_batch_size, self.spec.micro_batch_tokens
        )

    def _own(self, numbers: list[int]) -> list[TokenizedSample]:
        """This process's samples of a step."""
        return [self.corpus.samples[numbers[i]] for group in self._cuts(numbers)[1][distributed.rank()] for i in group]

    def _places(self, numbers: list[int]) -> tuple[int, int]:
        """Tokens of a step, and padded places, in all processes."""
        lengths, cuts = self._cuts(numbers)
        return sum(lengths), sum(padding(lengths, groups) for groups in cuts)

    def _micro_batches(self, numbers: list[int]) -> Iterator[tuple[Sequence[TokenizedSample], StepTokenCounts]]:
        """This process's samples, with the counts of the whole step."""
        drawn = [self.corpus.samples[i] for i in numbers]
        totals, groups = self.objective.count_tokens(drawn), self._cuts(numbers)[1][distributed.rank()]
        for group in groups:
            sharding.next_backward(self.states, last=group is groups[-1])
            yield [drawn[i] for i in group], totals

    def _student(self, drawn: Sequence[TokenizedSample]) -> StudentBatch:
        """The student's final states at the label rows of some samples."""
        ids, attention = pad([d.encoded.ids for d in drawn], self.device)
        low, whole = self.spec.precision == "bfloat16", self.spec.sharding == "none"
        with torch.autocast(
            self.device, torch.bfloat16, enabled=low, cache_enabled=whole
        ):  # a cache would keep all layers of a sharded model
            hidden = self.states(ids, attention)  # (B, T, d)
        places = torch.tensor(
            [i * hidden.shape[1] + at for i, d in enumerate(drawn) for at in label_positions(d.encoded)],
            device=self.device,
        )
        labels = [d.encoded.label_ids for d in drawn]
        flat = torch.tensor([y for sample in labels for y in sample], device=self.device)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        rows = hidden.flatten(0, 1)[places].float()  # (N, d), responses in order
        sizes, products = [len(y) for y in labels], torch.bfloat16 if low else None
        return StudentBatch(
            rows, ids.flatten()[places], flat, sizes, embedding.weight, head.weight, head.bias, products
        )

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    def _update(self, check: Callable[[float], None] = lambda norm: None) -> float:
        """Clip student and projectors, each by its own norm, and step. Returns the student's norm, which ``check`` sees first."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        distributed.sum_gradients(p for group in groups for p in group if not sharding.is_shard(p))
        norms = [clip_gradients(group, self.spec.clip_norm) for group in groups]
        for norm in norms:
            check(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms[0]

    def _check_finite(self, step: int, numbers: list[int], value: float) -> None:
        if not math.isfinite(value):
            names = ", ".join(self.corpus.samples[i].sample["id"][:12] for i in numbers)
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"step {step + 1} of {self.steps}: loss or gradient is {value} at learning rate {rate:.3g}; samples {names}. Nothing was published"
            )


def _prepared(student: Student, spec: Training, device: str) -> sharding.FinalHiddenStates:
    """The student in its precision, on its device or devices, ready to train."""
    model, dtype = student.model, getattr(torch, spec.parameters)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.bfloat16 and model.device.type != "meta":
        require_effective_updates(model, spec.lr)
    if spec.activation_checkpointing:
        sharding.layers_of(model)
    states = sharding.shard(model) if spec.sharding == "full" else sharding.FinalHiddenStates(model.to(device))
    if spec.activation_checkpointing:
        enable = (
            getattr(states.model, "activation_checkpointing_enable", None) or states.model.gradient_checkpointing_enable
        )  # the older name
        enable({"use_reentrant": False})
    return states.train()


def _say(text: str) -> None:
    """One line in the log, not one a process."""
    if distributed.rank() == 0:
        print(text, flush=True)
