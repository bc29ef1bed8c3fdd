"""Run a teacher once over a mix and keep what training needs: its final states at label rows (or its most likely tokens), and its head."""

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
from llmfusion.data.samples import Sample, read_jsonl
from llmfusion.errors import require
from llmfusion.models.batches import default_device, label_positions, pad
from llmfusion.models.loading import load_model, load_tokenizer, require_linear_head
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, HEAD, chunk_file_name, response_sha256
from llmfusion.teachers.chunks import Shard, assemble, chunk_count
from llmfusion.teachers.fingerprint import fingerprint
from llmfusion.teachers.statistics import statistics

logger = logging.getLogger(__name__)
Usable = list[tuple[Sample, Encoded]]


def capture(
    teacher: Artifact,
    mix: Artifact,
    folder: Path,
    settings: Capture,
    chat_template: str | None,
    store: ResumeFolder | None = None,
) -> dict[str, Any]:
    """Write the cache of ``teacher`` over ``mix`` into ``folder``. Returns the manifest's facts (docs/methods.md).

    Pieces are finished in ``store``, from where an interrupted capture goes on; without one, nothing survives an interruption.
    """
    if store is None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            return capture(teacher, mix, folder, settings, chat_template, ResumeFolder(Path(place), ""))
    capture_chunks(teacher, mix, settings, chat_template, store, Shard())
    return assemble_cache(teacher, mix, [store.folder], folder, settings, chat_template)


def capture_chunks(
    teacher: Artifact, mix: Artifact, settings: Capture, chat_template: str | None, store: ResumeFolder, shard: Shard
) -> None:
    """Finish the shard's pieces in ``store``, and with piece 0 the head; what is there already is left as it is."""
    store.remove_temporary()
    store.remove_others()
    kind, samples = settings.kind, mix.facts["samples"]
    numbers = shard.chunks(samples, kind)
    missing = {number for number in numbers if not store.has(chunk_file_name(number))}
    headless = 0 in numbers and not store.has(HEAD)
    if not missing and not headless:
        return
    if len(missing) < len(numbers):
        logger.info(f"going on: {len(numbers) - len(missing)} of {len(numbers)} pieces are there")
    tokenizer = load_tokenizer(teacher, chat_template)
    reader = _Reader(teacher, settings, 1 + max(tokenizer.get_vocab().values()))
    if headless:
        store.put(HEAD, _writer(reader.tensors_of_head()), {"known": reader.known})
    for number, part in enumerate(_parts(mix, CHUNK_SAMPLES[kind])):
        if number in missing:
            began = time.monotonic()
            tensors, note, tokens = reader.piece(part, tokenizer, mix.facts["max_length"])
            store.put(chunk_file_name(number), _writer(tensors) if tensors else None, note)
            logger.info(
                f"piece {number + 1} of {chunk_count(samples, kind)}: {tokens / (time.monotonic() - began):,.0f} tokens/s"
            )


def _writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """Writes tensors to a safetensors file."""
    from safetensors.torch import save_file

    return lambda path: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def assemble_cache(
    teacher: Artifact, mix: Artifact, folders: list[Path], folder: Path, settings: Capture, chat_template: str | None
) -> dict[str, Any]:
    """The cache in ``folder`` from finished pieces in ``folders``, without the teacher's weights. Returns the manifest's facts."""
    kind = settings.kind
    facts = assemble(folders, folder, mix.facts["samples"], kind)
    tokenizer = load_tokenizer(teacher, chat_template)
    tokenizer.save_pretrained(folder)
    of_topk = {"k": settings.k} if kind == "topk" else {}
    return {
        **facts,
        **of_topk,
        "kind": kind,
        "known_tokens": len(tokenizer),
        "fingerprint": fingerprint(teacher, mix, tokenizer, settings),
    }


def _parts(mix: Artifact, size: int) -> Iterator[list[Sample]]:
    samples = read_jsonl(mix.file("samples.jsonl"))
    while part := list(islice(samples, size)):
        yield part


class _Reader:
    """The teacher in memory, and what one piece of the mix gives."""

    def __init__(self, teacher: Artifact, settings: Capture, known: int):
        self.size, self.kind = settings.batch_size, settings.kind
        self.top = settings.k if self.kind == "topk" else 0
        model = load_model(teacher, settings.dtype)
        require_linear_head(model.config, teacher.folder)
        self.model = model.to(default_device())
        head = model.get_output_embeddings()
        self.weight, self.bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.known = min(known, len(self.weight))
        require(self.top <= self.known, f"capture: k is {self.top}, {teacher.folder} knows {self.known} tokens")
        self.head = self.weight[: self.known].float()  # once: at 8B it takes 2 GB, and every batch needs it
        self.head_bias = None if self.bias is None else self.bias[: self.known].float()

    def tensors_of_head(self) -> dict[str, Tensor]:
        """The head as the teacher has it, and the embeddings unless they are tied to it."""
        head = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if self.embedding.data_ptr() != self.weight.data_ptr():
            head["embedding"] = self.embedding
        return {name: tensor.cpu() for name, tensor in head.items()}

    def piece(
        self, samples: list[Sample], tokenizer: Any, longest: int
    ) -> tuple[dict[str, Tensor], dict[str, Any], int]:
        """Tensors of a piece in the order of its samples, its note, and the tokens that were read."""
        encoded = [(sample, encode(sample, tokenizer, longest)) for sample in samples]
        usable = [(sample, found) for sample, found in encoded if not isinstance(found, str)]
        moments = {name: _Moments() for name in ("hidden", "target_embedding", "index_embedding")}
        rows: dict[str, dict[str, Tensor]] = {}
        gap = 0.0
        # by length, so that little is padded; a pure function of the piece
        ordered = sorted(usable, key=lambda pair: len(pair[1].ids))
        for start in range(0, len(ordered), self.size):
            batch = ordered[start : start + self.size]
            found, apart = self._batch(batch, moments, compare=start == 0)
            rows |= found
            gap = max(gap, apart)
        tensors = {
            name: torch.cat([rows[sample["id"]][name] for sample, _ in usable])
            for name in next(iter(rows.values()), {})
        }
        note = {
            "index": _index(usable), "moments": {name: found.sums for name, found in moments.items()}, "gap": gap,
            "sums": {"tail": float(tensors["tail"].double().sum()) if "tail" in tensors else 0.0} if self.top else {},
            "rejected": [(found, sample["id"]) for sample, found in encoded if isinstance(found, str)],
        }  # fmt: skip
        return tensors, note, sum(len(found.ids) for _, found in usable)

    @torch.inference_mode()
    def _batch(
        self, batch: Usable, moments: dict[str, "_Moments"], compare: bool
    ) -> tuple[dict[str, dict[str, Tensor]], float]:
        """One forward pass: what is kept of every sample, by id, and with ``compare`` how far it is from the model's own log-probabilities."""
        ids, attention = pad([e.ids for _, e in batch], default_device())
        hidden = self.model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
        places = torch.tensor(
            [i * hidden.shape[1] + at for i, (_, e) in enumerate(batch) for at in label_positions(e)],
            device=hidden.device,
        )
        states, sizes = hidden.flatten(0, 1)[places], [len(e.label_ids) for _, e in batch]  # (n, d)
        labels = torch.tensor([y for _, e in batch for y in e.label_ids], dtype=torch.int32, device=hidden.device)
        _require_finite(batch, "states", states, sizes)
        found = statistics(states, self.head, self.head_bias, labels, self.known, top=self.top)
        for name, tensor in found.items():
            _require_finite(batch, name, tensor, sizes)
        apart = self._compare(ids, attention, places, labels, found["label_logprob"]) if compare else 0.0
        x, y = self.embedding[ids.flatten()[places]], self.embedding[labels.long()]
        for name, values in {"hidden": (states,), "target_embedding": (y,), "index_embedding": (x, y)}.items():
            moments[name].add(*values)
        kept = {"label_id": labels, **found} | ({"hidden": states} if self.kind == "hidden" else {})
        split = {name: tensor.cpu().split(sizes) for name, tensor in kept.items()}
        return {
            sample["id"]: {name: parts[i] for name, parts in split.items()} for i, (sample, _) in enumerate(batch)
        }, apart

    def _compare(self, ids: Tensor, attention: Tensor, places: Tensor, labels: Tensor, found: Tensor) -> float:
        """Largest difference between the model's own log-probs of labels and those from states and head."""
        logits = (
            self.model(input_ids=ids, attention_mask=attention).logits[..., : self.known].flatten(0, 1)[places].float()
        )  # (n, V)
        own = logits.log_softmax(-1).gather(1, labels.long()[:, None])[:, 0]
        gap = float((own - found).abs().max())
        # 16-bit logits of size z are themselves rounded by up to 2^-8 z
        rounding = 0.0 if self.weight.dtype == torch.float32 else 2**-7 * float(logits.abs().max())
        require(
            gap < 0.1 + rounding,
            f"the states through the saved head miss the model's own log-probabilities by {gap:.3g} nats: its head does more than a linear map",
        )  # false for NaN, too
        return round(gap, 9)


def _index(usable: Usable) -> list[dict[str, Any]]:
    out, start = [], 0
    for sample, encoded in usable:
        starts, prompts = encoded.segments()
        length = len(encoded.label_ids)
        out.append(
            {"id": sample["id"], "start": start, "length": length, "segment_starts": starts, "segment_prompts": prompts, "response_sha256": response_sha256(sample)}
        )  # fmt: skip
        start += length
    return out


def _require_finite(batch: Usable, what: str, values: Tensor, sizes: list[int]) -> None:
    if not bool(torch.isfinite(values).all()):
        wrong = next(
            sample["id"]
            for (sample, _), part in zip(batch, values.split(sizes), strict=True)
            if not bool(torch.isfinite(part).all())
        )
        require(False, f"sample {wrong}: the teacher's {what} are not finite; nothing was published")


class _Moments:
    """Count, sum and sum of squares of everything added, in float64."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0]

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            values = tensor.double()
            added = float(values.numel()), float(values.sum()), float((values * values).sum())
            self.sums = [total + more for total, more in zip(self.sums, added, strict=True)]
