"""Run a teacher once over a mix and keep what training needs.

That is its head, and its final hidden states at label positions, or its most likely tokens there.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfusion.artifacts.resume import ResumeFolder
from llmfusion.artifacts.store import Artifact
from llmfusion.data.chat import Encoded, encode
from llmfusion.data.samples import Sample, read_samples
from llmfusion.errors import UserError, require
from llmfusion.models.batches import default_device, label_positions, pad
from llmfusion.models.loading import load_model, load_tokenizer, require_linear_head
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, HEAD_FILE, chunk_file_name, response_sha256
from llmfusion.teachers.chunks import ChunkNote, Shard, assemble, chunk_count
from llmfusion.teachers.fingerprint import fingerprint
from llmfusion.teachers.statistics import statistics

logger = logging.getLogger(__name__)
EncodedSamples = list[tuple[Sample, Encoded]]


def capture(
    teacher: Artifact,
    mix: Artifact,
    folder: Path,
    capture: Capture,
    chat_template: str | None,
    finished: ResumeFolder | None = None,
) -> dict[str, Any]:
    """Write the cache of ``teacher`` over ``mix`` into ``folder``. Returns the manifest's facts (docs/methods.md).

    Finished chunks are kept in ``finished``, from where an interrupted capture goes on; without it, nothing survives an
    interruption.
    """
    if finished is None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            return _capture(teacher, mix, folder, capture, chat_template, ResumeFolder(Path(temporary), ""))
    return _capture(teacher, mix, folder, capture, chat_template, finished)


def _capture(
    teacher: Artifact, mix: Artifact, folder: Path, capture: Capture, chat_template: str | None, finished: ResumeFolder
) -> dict[str, Any]:
    capture_chunks(teacher, mix, capture, chat_template, finished, Shard())
    return assemble_cache(teacher, mix, [finished.folder], folder, capture, chat_template)


def capture_chunks(
    teacher: Artifact, mix: Artifact, capture: Capture, chat_template: str | None, finished: ResumeFolder, shard: Shard
) -> None:
    """Finish the shard's chunks in ``finished``, and with chunk 0 the head; what is finished already is kept."""
    finished.remove_temporary()
    finished.remove_others()
    samples = mix.facts["samples"]
    numbers = shard.chunks(samples, capture.kind)
    missing = {number for number in numbers if not finished.has(chunk_file_name(number))}
    needs_head = 0 in numbers and not finished.has(HEAD_FILE)
    if not missing and not needs_head:
        return
    if len(missing) < len(numbers):
        logger.info("going on: %d of %d chunks are there", len(numbers) - len(missing), len(numbers))
    tokenizer = load_tokenizer(teacher, chat_template)
    loaded = _LoadedTeacher(teacher, capture, 1 + max(tokenizer.get_vocab().values()))
    if needs_head:
        finished.put(HEAD_FILE, _writer(loaded.head_tensors()), {"known": loaded.head_rows})
    for number, chunk in enumerate(_chunks_of(mix, CHUNK_SAMPLES[capture.kind])):
        if number in missing:
            start = time.monotonic()
            tensors, note, tokens = loaded.capture_chunk(chunk, tokenizer, mix.facts["max_length"])
            finished.put(chunk_file_name(number), _writer(tensors) if tensors else None, note)
            speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
            logger.info("chunk %d of %d: %s", number + 1, chunk_count(samples, capture.kind), speed)


def _writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """Writes tensors to a safetensors file."""
    from safetensors.torch import save_file

    return lambda path: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def assemble_cache(
    teacher: Artifact, mix: Artifact, folders: list[Path], folder: Path, capture: Capture, chat_template: str | None
) -> dict[str, Any]:
    """Write the cache into ``folder`` from finished chunks in ``folders``, without the teacher's weights.

    Returns the manifest's facts.
    """
    facts = assemble(folders, folder, mix.facts["samples"], capture.kind)
    tokenizer = load_tokenizer(teacher, chat_template)
    tokenizer.save_pretrained(folder)
    k = {"k": capture.k} if capture.kind == "topk" else {}
    return {
        **facts,
        **k,
        "kind": capture.kind,
        "known_tokens": len(tokenizer),
        "fingerprint": fingerprint(teacher, mix, tokenizer, capture),
    }


def _chunks_of(mix: Artifact, size: int) -> Iterator[list[Sample]]:
    """The mix's samples, ``size`` at a time."""
    samples = read_samples(mix.file("samples.jsonl"))
    while chunk := list(islice(samples, size)):
        yield chunk


class _LoadedTeacher:
    """The teacher in memory: the forward pass over a chunk and everything that is kept of it."""

    def __init__(self, teacher: Artifact, capture: Capture, token_ids: int):
        self.batch_size = capture.batch_size
        self.kind = capture.kind
        self.top_k = capture.k if capture.kind == "topk" else 0
        model = load_model(teacher, capture.dtype)
        require_linear_head(model.config, teacher.folder)
        self.model = model.to(default_device())
        head = model.get_output_embeddings()
        self.weight = head.weight.detach()  # (V, d)
        self.bias = None if head.bias is None else head.bias.detach()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.head_rows = min(token_ids, len(self.weight))  # the rows behind them belong to no token
        require(
            self.top_k <= self.head_rows, f"capture: k is {self.top_k}, {teacher.folder} knows {self.head_rows} tokens"
        )
        self.float_weight = self.weight[: self.head_rows].float()  # once: at 8B it takes 2 GB, and every batch needs it
        self.float_bias = None if self.bias is None else self.bias[: self.head_rows].float()

    def head_tensors(self) -> dict[str, Tensor]:
        """The head as the teacher has it, and the embeddings unless they are tied to it."""
        head = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if self.embedding.data_ptr() != self.weight.data_ptr():
            head["embedding"] = self.embedding
        return {name: tensor.cpu() for name, tensor in head.items()}

    def capture_chunk(
        self, samples: list[Sample], tokenizer: Any, max_length: int
    ) -> tuple[dict[str, Tensor], ChunkNote, int]:
        """Tensors of a chunk in the order of its samples, its note, and the number of tokens that were read."""
        usable: EncodedSamples = []
        rejected = []
        for sample in samples:
            encoded = encode(sample, tokenizer, max_length)
            if isinstance(encoded, str):
                rejected.append((encoded, sample["id"]))
            else:
                usable.append((sample, encoded))
        rows, moments, max_difference = self._capture_samples(usable)
        names = next(iter(rows.values()), {})
        tensors = {name: torch.cat([rows[sample["id"]][name] for sample, _ in usable]) for name in names}
        tail = float(tensors["tail"].double().sum()) if "tail" in tensors else 0.0
        note = {
            "index": _index(usable),
            "moments": {name: added.sums for name, added in moments.items()},
            "gap": max_difference,
            "sums": {"tail": tail} if self.top_k else {},
            "rejected": rejected,
        }
        return tensors, note, sum(len(encoded.ids) for _, encoded in usable)

    def _capture_samples(
        self, samples: EncodedSamples
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, "_Moments"], float]:
        """Tensors by sample id, moments of states and embeddings, and the first batch's :meth:`_logprob_difference`."""
        moments = {name: _Moments() for name in ("hidden", "target_embedding", "index_embedding")}
        rows: dict[str, dict[str, Tensor]] = {}
        max_difference = 0.0
        # by length, so that little is padded; a pure function of the chunk
        by_length = sorted(samples, key=lambda pair: len(pair[1].ids))
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            of_batch, difference = self._capture_batch(batch, moments, compare=start == 0)
            rows |= of_batch
            max_difference = max(max_difference, difference)
        return rows, moments, max_difference

    @torch.inference_mode()
    def _capture_batch(
        self, batch: EncodedSamples, moments: dict[str, "_Moments"], compare: bool
    ) -> tuple[dict[str, dict[str, Tensor]], float]:
        """One forward pass: tensors by sample id, and with ``compare`` :meth:`_logprob_difference`, else 0."""
        ids, attention = pad([encoded.ids for _, encoded in batch], default_device())  # (B, T)
        hidden = self.model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
        positions = _flat_positions(batch, hidden)  # (n,)
        states = hidden.flatten(0, 1)[positions]  # (n, d)
        sizes = [len(encoded.label_ids) for _, encoded in batch]
        label_ids = [label for _, encoded in batch for label in encoded.label_ids]
        labels = torch.tensor(label_ids, dtype=torch.int32, device=hidden.device)  # (n,)
        _require_finite(batch, "states", states, sizes)
        of_rows = statistics(states, self.float_weight, self.float_bias, labels, self.head_rows, top_k=self.top_k)
        for name, tensor in of_rows.items():
            _require_finite(batch, name, tensor, sizes)
        difference = (
            self._logprob_difference(ids, attention, positions, labels, of_rows["label_logprob"]) if compare else 0.0
        )
        targets = self.embedding[labels.long()]  # (n, d)
        moments["hidden"].add(states)
        moments["target_embedding"].add(targets)
        moments["index_embedding"].add(self.embedding[ids.flatten()[positions]], targets)
        kept = {"label_id": labels, **of_rows} | ({"hidden": states} if self.kind == "hidden" else {})
        return _split_by_sample(batch, kept, sizes), difference

    def _logprob_difference(
        self, ids: Tensor, attention: Tensor, positions: Tensor, labels: Tensor, from_states: Tensor
    ) -> float:
        """Largest difference (nats) between the model's log-probabilities of the labels and those from states and head.

        Raises :class:`UserError` where it is more than rounding explains: then the model's head is not a linear map.
        """
        logits = self.model(input_ids=ids, attention_mask=attention).logits  # (B, T, V)
        logits = logits[..., : self.head_rows].flatten(0, 1)[positions].float()  # (n, V)
        own = logits.log_softmax(-1).gather(1, labels.long()[:, None])[:, 0]  # (n,)
        difference = float((own - from_states).abs().max())
        # 16-bit logits of size z are themselves rounded by up to 2^-8 z
        rounding = 0.0 if self.weight.dtype == torch.float32 else 2**-7 * float(logits.abs().max())
        require(
            difference < 0.1 + rounding,  # false for a NaN, too
            f"the states through the saved head miss the model's own log-probabilities by {difference:.3g} nats: "
            "its head does more than a linear map",
        )
        return round(difference, 9)


def _flat_positions(batch: EncodedSamples, hidden: Tensor) -> Tensor:
    """Label positions of a batch (n,) in ``hidden (B, T, d)`` flattened to (B * T, d)."""
    length = hidden.shape[1]
    positions = [i * length + at for i, (_, encoded) in enumerate(batch) for at in label_positions(encoded)]
    return torch.tensor(positions, device=hidden.device)


def _split_by_sample(
    batch: EncodedSamples, tensors: dict[str, Tensor], sizes: list[int]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of a batch's rows as those of each sample, by id, on the CPU."""
    parts = {name: tensor.cpu().split(sizes) for name, tensor in tensors.items()}
    return {sample["id"]: {name: split[i] for name, split in parts.items()} for i, (sample, _) in enumerate(batch)}


def _index(samples: EncodedSamples) -> list[dict[str, Any]]:
    """The chunk's part of the index, without its number."""
    index = []
    start = 0
    for sample, encoded in samples:
        segment_starts, segment_prompts = encoded.segments()
        length = len(encoded.label_ids)
        row = {
            "id": sample["id"],
            "start": start,
            "length": length,
            "segment_starts": segment_starts,
            "segment_prompts": segment_prompts,
            "response_sha256": response_sha256(sample),
        }
        index.append(row)
        start += length
    return index


def _require_finite(batch: EncodedSamples, what: str, values: Tensor, sizes: list[int]) -> None:
    """Raise :class:`UserError` naming the first sample whose values are not finite."""
    if bool(torch.isfinite(values).all()):
        return
    for (sample, _), part in zip(batch, values.split(sizes), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise UserError(f"sample {sample['id']}: the teacher's {what} are not finite; nothing was published")


class _Moments:
    """Count, sum and sum of squares of everything added, in float64."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0]

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            values = tensor.double()
            added = (float(values.numel()), float(values.sum()), float((values * values).sum()))
            self.sums = [total + more for total, more in zip(self.sums, added, strict=True)]
