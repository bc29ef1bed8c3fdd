"""The teacher cache: final hidden states of label rows, from which exact distributions are recomputed.

Row i of a sample is the state that *predicts* its i-th label token, the end token included. Files:

- ``shard-NNNNN.safetensors``: ``hidden (n, d)`` bf16 or fp32, ``label_logprob``, ``entropy``, ``logsumexp (n,)`` fp32 in
  nats, ``label_id (n,)`` int32: 2d + 16 bytes a row in bf16. Statistics are of the rounded states through the saved head.
- ``index.parquet``: per sample ``id``, ``shard``, ``start``, ``length``, and per response ``segment_starts`` (row within
  the sample) and ``segment_prompts`` (the token before it), so that every row's input token is known, and ``response_sha256``.
- ``head.safetensors``: ``weight (V, d)``, ``bias`` if there is one, ``embedding`` unless it is tied to the head.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmfusion.artifacts import Artifact
from llmfusion.errors import UserError

SHARD_ROWS = 65_536  # part of the format: the same rows always lie in the same shards
STATISTICS = ("label_logprob", "entropy", "logsumexp")
TENSORS = ("hidden", "label_id", *STATISTICS)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


class Cache:
    """Random access to a verified cache by sample id; shards are memory-mapped."""

    def __init__(self, artifact: Artifact):
        import pyarrow.parquet

        self.artifact, self.facts = artifact, artifact.facts
        index = pyarrow.parquet.read_table(artifact.file("index.parquet")).to_pylist()
        self.index: dict[str, dict[str, Any]] = {row["id"]: row for row in index}
        self._shards: dict[int, Any] = {}

    def rows(self, sample: str) -> dict[str, Tensor]:
        """All tensors of a sample's rows. Raises :class:`UserError` for a sample that is not in the cache."""
        if sample not in self.index:
            raise UserError(
                f"{self.artifact.folder}: has no rows for sample {sample}; it was too long for the teacher's chat template. "
                "Name the teacher under the mix's tokenizers, so that the mix keeps only what fits every model"
            )
        entry = self.index[sample]
        shard = self._shard(entry["shard"])
        span = slice(entry["start"], entry["start"] + entry["length"])
        return {name: shard.get_slice(name)[span] for name in TENSORS}

    def head(self) -> tuple[Tensor, Tensor | None]:
        """``(weight (V, d), bias (V,) or None)`` as the teacher has them."""
        with safe_open(self.artifact.file("head.safetensors"), framework="pt") as file:
            return file.get_tensor("weight"), file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(self.artifact.file(shard_name(number)), framework="pt")
        return self._shards[number]


def statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, known: int, chunk: int = 512) -> dict[str, Tensor]:
    """Label log-prob, entropy and logsumexp (N,) fp32, of ``hidden (N, d)`` through a head ``(V, d)``, first ``known`` rows only."""
    out: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    weight, bias = weight[:known].float(), None if bias is None else bias[:known].float()
    for start in range(0, len(hidden), chunk):
        logits = torch.nn.functional.linear(hidden[start : start + chunk].float(), weight, bias)  # (c, V)
        total = logits.logsumexp(-1)
        log_q = logits - total[:, None]
        out["label_logprob"].append(log_q.gather(1, labels[start : start + chunk, None].long())[:, 0])
        out["entropy"].append(-(log_q.exp() * log_q).sum(-1))
        out["logsumexp"].append(total)
    return {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in out.items()}
