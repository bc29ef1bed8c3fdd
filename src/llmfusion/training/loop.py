"""The training loop: batches, the objective, clipping, the optimizer, resume state, metrics."""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import TokenizedSample
from llmfusion.errors import UserError
from llmfusion.fusion.objective import Objective, StepTokenCounts, add_records
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.teacher import Teacher
from llmfusion.models.batches import default_device, label_positions, pad
from llmfusion.models.loading import save_model
from llmfusion.study.hints import untrained_projectors
from llmfusion.study.schema.options import FusionOptions
from llmfusion.study.schema.training import Training
from llmfusion.training import distributed, resume_state, sharding
from llmfusion.training.batching import MicroBatches, micro_batches, padding
from llmfusion.training.corpus import Corpus, read_ahead
from llmfusion.training.optim import CautiousAdamW, clip_grad_norm, learning_rate, require_effective_updates
from llmfusion.training.progress import ProgressMeter
from llmfusion.training.save_deadline import SaveDeadline, TimeLimit

logger = logging.getLogger(__name__)
SAVE_SECONDS = 900.0  # between saves, and so the most a killed job can lose
RECORD_EVERY = 10  # steps between records of metrics.jsonl
STOPPED = 143  # exit status of a training that SIGTERM, SIGINT or its time limit ended


@dataclass
class Student:
    """The student: its model and tokenizer. Of a sharded training, processes but the first may give an empty model."""

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

    Resume states lie in the folder ``state`` and belong to ``key`` (one spec over the very content of its inputs).
    Stops within a step at a loss that is not finite (:class:`UserError`). SIGTERM, SIGINT (Ctrl-C) and the end of the
    time limit save the resume state and end the process with status 143; the next call goes on bit for bit.
    ``on_start`` is called when everything is loaded.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older versions of torch ask for it on GPUs
    torch.use_deterministic_algorithms(True)
    # a help for finding defects that costs 5 % of the time; no operation used here reads memory it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    corpus = Corpus(mixes, student.tokenizer)
    loop = _Loop(student, run, fusion, corpus, teachers, ResumeFolder(state, key), time_limit)
    on_start()
    loop.train()
    facts = {
        "steps": loop.steps,
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
        resume: ResumeFolder,
        time_limit: TimeLimit | None,
    ):
        self.run = run
        self.corpus = corpus
        self.teachers = teachers
        self.resume = resume
        self.time_limit = time_limit
        self.steps = corpus.steps(run)
        self.device = default_device()
        self.final_hidden_states = _prepare(student, run, self.device)
        self.model = self.final_hidden_states.model
        student.model = self.model
        torch.manual_seed(run.seed)  # of the projectors' weights and of dropout
        self.objective = Objective(fusion, teachers, self.model.get_output_embeddings().weight.shape[1]).to(self.device)
        self.trained = nn.ModuleDict({"student": self.model, "objective": self.objective})
        self.optimizer = _optimizer(self.model, self.objective, run)
        # steps of the projectors alone, before the student's first
        self.projector_steps = fusion.projector_steps if fusion and len(self.objective.projectors) else 0
        parameters = sum(p.numel() for p in self.trained.parameters())
        self.deadline = SaveDeadline(parameters)
        self.progress = ProgressMeter(self.steps, parameters)
        self.records: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.stop_requested = False  # of this process, by a signal
        self.stop = False  # what all processes have agreed on
        self.last_save = time.monotonic()

    def train(self) -> None:
        """Go on from the newest resume state, or begin, and make all steps that are left."""
        for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT: Ctrl-C where Snakemake runs in a terminal
            signal.signal(number, self._request_stop)
        done = self._restore()
        if not done and len(self.objective.projectors) and not self.projector_steps:
            projected = zip(self.teachers, self.objective.projectors_of, strict=True)
            names = [teacher.name for teacher, projectors in projected if projectors is not None]
            self._log(f"note: {untrained_projectors(names)}")
        self._train_projectors(done)
        first = max(0, done - self.projector_steps)
        self.progress.begin(first)
        batches = self.corpus.batches(self.run, first, self.steps)
        for step, indices in read_ahead(batches, self._local_samples, self.teachers):
            with self.deadline.step():
                self._step(step, indices)
            if self._must_save() and step + 1 < self.steps:
                self._save(self.projector_steps + step + 1)
        self.progress.close()

    def _restore(self) -> int:
        """Load the newest resume state. Returns the steps made before it, those of the projectors alone included."""
        state = resume_state.restore(self.resume, self.trained, self.optimizer)
        if state is None:
            return 0
        done, progress = state
        self.records = progress["records"]
        self.timings = progress["timings"]
        self._log(f"going on after step {done} of {self.projector_steps + self.steps}")
        return done

    def _save(self, done: int) -> None:
        """Save after ``done`` steps, those of the projectors alone included, and end the process if it is to stop.

        The other processes wait, or torchrun would take the first one for a straggler.
        """
        with self.deadline.save():
            progress = {"records": self.records, "timings": self.timings}
            resume_state.save(self.resume, done, self.trained, self.optimizer, progress)
            [stop_requested] = distributed.any_across_ranks(self.stop_requested)  # also during the save
        self.last_save = time.monotonic()
        if self.stop or stop_requested:
            self.progress.close()
            total = self.projector_steps + self.steps
            self._log(f"stopped after step {done} of {total}; the state is saved in {self.resume.folder}")
            sys.exit(STOPPED)

    def _must_save(self) -> bool:
        """Whether to save now, and in ``self.stop`` whether to end then; all processes decide alike."""
        must_stop = self.stop_requested or self.deadline.is_over(self.time_limit)
        is_due = time.monotonic() - self.last_save > SAVE_SECONDS
        self.stop, is_due = distributed.any_across_ranks(must_stop, is_due)
        return self.stop or is_due

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _train_projectors(self, done: int) -> None:
        """Steps of the projectors alone, over batches of their own; ``done`` were made before.

        Projections of random states would damage the student.
        """
        self._set_lr(None)
        seed = -1 - self.run.seed
        batches = self.corpus.batches(self.run.model_copy(update={"seed": seed}), done, self.projector_steps)
        for step, indices in batches:
            with self.deadline.step():
                distributed.seed_step(seed, step)
                for samples, counts in self._micro_batches(indices):
                    with torch.no_grad():
                        student = self._student_batch(samples)
                    self.objective.projector_loss(student, samples, counts).backward()
                self._update(-1, indices)
            if self._must_save() or step + 1 == self.projector_steps:
                sharding.reshard(self.final_hidden_states)
                self._save(step + 1)

    def _step(self, step: int, indices: list[int]) -> None:
        """One optimizer step over the samples with these indices."""
        self._set_lr(step)
        distributed.seed_step(self.run.seed, step)
        with self.progress.step(*self._tokens_and_padding(indices)):
            record = self._forward_backward(indices)
            self._require_finite(record["loss"], step, indices)
            grad_norm = self._update(step, indices)
        lr = self.optimizer.param_groups[0]["lr"]
        self.progress.report(step + 1, record["loss"], lr)
        if step % RECORD_EVERY == 0 or step + 1 == self.steps:
            self.records.append({"step": step + 1, "lr": lr, **record, "grad_norm": grad_norm})
            self.timings.append(self.progress.timing(step + 1))

    def _forward_backward(self, indices: list[int]) -> dict[str, Any]:
        """Add up gradients over this process's micro-batches. Returns the whole step's record: loss and its terms."""
        record: dict[str, Any] = {}
        for samples, counts in self._micro_batches(indices):
            loss, terms = self.objective(self._student_batch(samples), samples, counts)
            loss.backward()
            add_records(record, terms)
        return distributed.all_reduce_record(record)

    def _split(self, indices: list[int]) -> tuple[list[int], list[MicroBatches]]:
        """Lengths of a step's samples, and each process's micro-batches of them."""
        run = self.run
        lengths = [len(self.corpus.samples[i].encoded.ids) for i in indices]
        world_size = distributed.world_size()
        return lengths, micro_batches(lengths, world_size, run.micro_batch_size, run.micro_batch_tokens)

    def _local_samples(self, indices: list[int]) -> list[TokenizedSample]:
        """This process's samples of a step."""
        groups = self._split(indices)[1][distributed.rank()]
        return [self.corpus.samples[indices[i]] for group in groups for i in group]

    def _tokens_and_padding(self, indices: list[int]) -> tuple[int, int]:
        """Tokens of a step, and padded places, in all processes."""
        lengths, groups_by_rank = self._split(indices)
        return sum(lengths), sum(padding(lengths, groups) for groups in groups_by_rank)

    def _micro_batches(self, indices: list[int]) -> Iterator[tuple[list[TokenizedSample], StepTokenCounts]]:
        """This process's samples of a step by micro-batch, with the counts of the whole step."""
        samples = [self.corpus.samples[i] for i in indices]
        counts = self.objective.count_tokens(samples)
        groups = self._split(indices)[1][distributed.rank()]
        for group in groups:
            sharding.set_is_last_backward(self.final_hidden_states, is_last=group is groups[-1])
            yield [samples[i] for i in group], counts

    def _student_batch(self, samples: Sequence[TokenizedSample]) -> StudentBatch:
        """The student's final hidden states at the label positions of some samples."""
        ids, attention = pad([sample.encoded.ids for sample in samples], self.device)  # (B, T)
        is_bfloat16 = self.run.precision == "bfloat16"
        keep_casts = self.run.sharding == "none"  # autocast's cache would keep all layers of a sharded model
        with torch.autocast(self.device, torch.bfloat16, enabled=is_bfloat16, cache_enabled=keep_casts):
            hidden = self.final_hidden_states(ids, attention)  # (B, T, d)
        positions = [
            row * hidden.shape[1] + position
            for row, sample in enumerate(samples)
            for position in label_positions(sample.encoded)
        ]
        places = torch.tensor(positions, device=self.device)
        labels = [sample.encoded.label_ids for sample in samples]
        head = self.model.get_output_embeddings()
        return StudentBatch(
            hidden.flatten(0, 1)[places].float(),  # (N, d), responses in order
            ids.flatten()[places],  # (N,)
            torch.tensor([label for response in labels for label in response], device=self.device),  # (N,)
            [len(response) for response in labels],
            self.model.get_input_embeddings().weight,
            head.weight,
            head.bias,
            torch.bfloat16 if is_bfloat16 else None,
        )

    def _set_lr(self, step: int | None) -> None:
        """Set each group's rate of ``step``: from its own peak to the ``lr_min`` of all; of None its peak."""
        run = self.run
        for group in self.optimizer.param_groups:
            peak = group["peak_lr"]
            lowest = min(run.lr_min, peak)  # a group whose peak is below lr_min stays at its peak
            schedule = (run.warmup, run.schedule)
            group["lr"] = peak if step is None else learning_rate(step, self.steps, peak, lowest, *schedule)

    def _update(self, step: int, indices: list[int]) -> float:
        """Clip student and projectors, each by its own norm, and update them. Returns the student's norm before."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        distributed.all_reduce_gradients(p for group in groups for p in group if not sharding.is_shard(p))
        norms = [clip_grad_norm(group, self.run.clip_norm) for group in groups]
        for norm in norms:
            self._require_finite(norm, step, indices)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms[0]

    def _require_finite(self, value: float, step: int, indices: list[int]) -> None:
        """Raise :class:`UserError` for a loss or norm that is not finite; steps of the projectors alone are step 0."""
        if not math.isfinite(value):
            names = ", ".join(self.corpus.samples[i].sample["id"][:12] for i in indices)
            lr = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"step {step + 1} of {self.steps}: loss or gradient is {value} at learning rate {lr:.3g}; "
                f"samples {names}. Nothing was published"
            )

    def _log(self, message: str) -> None:
        """One line in the log, not one a process."""
        if distributed.rank() == 0:
            logger.info("%s", message)


def _optimizer(model: Any, objective: Objective, run: Training) -> CautiousAdamW:
    """The optimizer of the student and, at rates of their own, of projectors and the target's parameters."""
    return CautiousAdamW(
        [{"params": list(model.parameters()), "peak_lr": run.lr}, *objective.parameter_groups(run)],
        run.lr,
        (run.betas[0], run.betas[1]),
        run.eps,
        run.weight_decay,
        run.optimizer == "c_adamw",
        run.cautious_norm,
    )


def _prepare(student: Student, run: Training, device: str) -> sharding.FinalHiddenStates:
    """The student in its precision, on its device or devices, ready to train."""
    model = student.model
    dtype = getattr(torch, run.parameters)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.bfloat16 and model.device.type != "meta":
        require_effective_updates(model, run.lr)
    if run.activation_checkpointing:
        sharding.layers_of(model)  # refuses a model without any
    prepared = sharding.shard(model) if run.sharding == "full" else sharding.FinalHiddenStates(model.to(device))
    if run.activation_checkpointing:
        _enable_activation_checkpointing(prepared.model)
    return prepared.train()


def _enable_activation_checkpointing(model: Any) -> None:
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # older name
    enable({"use_reentrant": False})
