"""Run a teacher once over a mix and keep what training needs: final hidden states at label rows, and its head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmfusion.artifacts import Artifact, require
from llmfusion.data.chat import Encoded, encode
from llmfusion.data.samples import Sample, read_jsonl
from llmfusion.data.sources import Rejected
from llmfusion.models.batches import device_of, label_rows, pad
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.teachers.cache import SHARD_ROWS, TENSORS, response_sha256, shard_name, statistics

UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # would change logits behind the saved head


def capture(teacher: Artifact, mix: Artifact, folder: Path, settings: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """Write the cache of ``teacher`` over ``mix`` into ``folder``. Returns the manifest's facts.

    Facts: samples, rows, rejected samples by reason, the three standard deviations cross-model attention divides by, and
    how far the rounded states through the saved head are from the model's own log-probabilities.
    """
    model = load_model(teacher, settings.get("dtype", "bfloat16"))
    for name in UNSUPPORTED:
        require(getattr(model.config, name, None) in (None, 1.0), f"{teacher.folder}: {name} changes logits behind the head; such teachers cannot be cached")
    tokenizer = load_tokenizer(teacher, chat_template)
    model = model.to(device_of())
    writer = _Writer(model, len(tokenizer), folder)
    rejected = Rejected()
    for batch in _batches(mix, tokenizer, settings.get("batch_size", 16), rejected):
        writer.add(batch)
    tokenizer.save_pretrained(folder)
    return {**writer.finish(), "rejected": rejected.facts(), "known_tokens": len(tokenizer)}


def _batches(mix: Artifact, tokenizer: Any, size: int, rejected: Rejected) -> Iterator[list[tuple[Sample, Encoded]]]:
    batch: list[tuple[Sample, Encoded]] = []
    for sample in read_jsonl(mix.file("samples.jsonl")):
        encoded = encode(sample, tokenizer, mix.facts["max_length"])
        if isinstance(encoded, str):
            rejected.add(encoded, sample["id"])
            continue
        batch.append((sample, encoded))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Writer:
    """Collects rows into shards of a fixed number of rows; a sample never crosses shards."""

    def __init__(self, model: Any, known: int, folder: Path):
        self.model, self.folder = model, folder
        head = model.get_output_embeddings()
        self.weight, self.bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.known = min(known, len(self.weight))
        self.head = self.weight[: self.known].float()  # once: at 8B it takes 2 GB, and every sample needs it
        self.head_bias = None if self.bias is None else self.bias[: self.known].float()
        self.rows: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
        self.index: list[dict[str, Any]] = []
        self.in_shard, self.shard, self.total = 0, 0, 0
        self.moments = {name: _Moments() for name in ("hidden", "target_embedding", "index_embedding")}
        self.gap: float | None = None

    @torch.inference_mode()
    def add(self, batch: list[tuple[Sample, Encoded]]) -> None:
        """One forward pass; every sample's rows go to the current shard."""
        ids, attention = pad([e.ids for _, e in batch], device_of())
        hidden = self.model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state  # (B, T, d)
        states = [hidden[i, label_rows(e)] for i, (_, e) in enumerate(batch)]
        for (sample, _), rows in zip(batch, states, strict=True):
            _require_finite(sample, "states", rows)
        if self.gap is None:
            self.gap = self._compare(ids, attention, hidden, batch)
        for (sample, encoded), rows in zip(batch, states, strict=True):
            self._add_sample(sample, encoded, rows)

    def _add_sample(self, sample: Sample, encoded: Encoded, rows: Tensor) -> None:
        if self.in_shard and self.in_shard + len(rows) > SHARD_ROWS:
            self._flush()
        labels = torch.tensor(encoded.label_ids, dtype=torch.int32, device=rows.device)
        stats = statistics(rows, self.head, self.head_bias, labels, self.known)
        for name, tensor in stats.items():
            _require_finite(sample, name, tensor)
        for name, tensor in {"hidden": rows, "label_id": labels, **stats}.items():
            self.rows[name].append(tensor.cpu())
        inputs = torch.tensor([encoded.ids[i] for i in label_rows(encoded)], device=rows.device)
        x, y = self.embedding[inputs], self.embedding[labels.long()]
        for name, values in {"hidden": (rows,), "target_embedding": (y,), "index_embedding": (x, y)}.items():
            self.moments[name].add(*values)
        starts, prompts = encoded.segments()
        self.index.append(
            {"id": sample["id"], "shard": self.shard, "start": self.in_shard, "length": len(rows), "segment_starts": starts,
             "segment_prompts": prompts, "response_sha256": response_sha256(sample)}
        )  # fmt: skip
        self.in_shard += len(rows)

    def _flush(self) -> None:
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.rows.items()}
        save_file(tensors, self.folder / shard_name(self.shard))
        self.rows = {name: [] for name in TENSORS}
        self.total, self.in_shard, self.shard = self.total + self.in_shard, 0, self.shard + 1

    def finish(self) -> dict[str, Any]:
        """Write the last shard, the index and the head."""
        import pyarrow
        import pyarrow.parquet

        require(bool(self.index), "no sample of the mix fits this teacher; see rejected samples in the log")
        self._flush()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.index), self.folder / "index.parquet")
        head = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if self.embedding.data_ptr() != self.weight.data_ptr():
            head["embedding"] = self.embedding
        save_file({name: tensor.cpu().contiguous() for name, tensor in head.items()}, self.folder / "head.safetensors")
        spread = {f"std_{name}": moments.std() for name, moments in self.moments.items()}
        return {"samples": len(self.index), "rows": self.total, "rows_of_head": self.known, "logprob_gap": self.gap, **spread}

    def _compare(self, ids: Tensor, attention: Tensor, hidden: Tensor, batch: list[tuple[Sample, Encoded]]) -> float:
        """Largest difference between the model's own log-probs of labels and those from states and head, first batch."""
        logits = self.model(input_ids=ids, attention_mask=attention).logits[..., : self.known].float()
        worst = 0.0
        for i, (_, encoded) in enumerate(batch):
            labels = torch.tensor(encoded.label_ids, device=ids.device)
            own = logits[i, label_rows(encoded)].log_softmax(-1).gather(1, labels[:, None])[:, 0]
            again = statistics(hidden[i, label_rows(encoded)], self.head, self.head_bias, labels, self.known)["label_logprob"]
            gap = float((own - again).abs().max())
            # 16-bit logits of size z are themselves rounded by up to 2^-8 z
            rounding = 0.0 if self.weight.dtype == torch.float32 else 2**-7 * float(logits[i, label_rows(encoded)].abs().max())
            require(
                gap < 0.1 + rounding,
                f"the states through the saved head miss the model's own log-probabilities by {gap:.3g} nats: its head does more than a linear map",
            )  # false for NaN, too
            worst = max(worst, gap)
        return round(worst, 9)


def _require_finite(sample: Sample, what: str, values: Tensor) -> None:
    require(bool(torch.isfinite(values).all()), f"sample {sample['id']}: the teacher's {what} are not finite; nothing was published")


class _Moments:
    """Standard deviation of everything added, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            values = tensor.double()
            self.count += values.numel()
            self.total += float(values.sum())
            self.squares += float((values * values).sum())

    def std(self) -> float:
        mean = self.total / self.count
        return max(self.squares / self.count - mean * mean, 0.0) ** 0.5
