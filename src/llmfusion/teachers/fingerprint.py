"""What a cache was captured from: a training refuses one that was captured from anything else, and says what differs."""

from typing import Any

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.io.digests import canonical, digest
from llmfusion.models.loading import load_tokenizer, vocabulary_sha256
from llmfusion.study.kinds.train_model import Captured
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache import Cache
from llmfusion.teachers.statistics import statistics

COMPARED = 64  # rows of the first batch: enough to tell teachers apart, and little memory beside a large vocabulary


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that turns a conversation into ids: vocabulary with added tokens, merges, chat template."""
    return digest(
        vocabulary_sha256(tokenizer), canonical(sorted(tokenizer.get_vocab().items())), tokenizer.chat_template or ""
    )


def fingerprint(teacher: Artifact, mix: Artifact, tokenizer: Any, settings: Capture) -> dict[str, Any]:
    """For the cache's manifest. ``teacher`` is the fingerprint of what was asked for as this model, ``weights`` its manifest's hash."""
    return {
        "teacher": teacher.manifest["fingerprint"],
        "weights": teacher.sha256,
        "revision": teacher.spec.get("base", {}).get("revision"),
        "tokenizer": tokenizer_sha256(tokenizer),
        "mix": mix.sha256,
        **form(settings),
    }


def form(settings: Capture) -> dict[str, Any]:
    """What the settings of a capture say about the rows."""
    kind = settings.kind
    return {"dtype": settings.dtype, "kind": kind, **({"k": settings.k} if kind == "topk" else {})}


def require_same(
    name: str, cache: Artifact, mix: Artifact, captured: Captured, chat_template: str | None, teacher: Artifact | None
) -> None:
    """Raise :class:`UserError` naming everything in which the cache of ``name`` is not the one that a training with ``spec`` asks for.

    ``spec.captured`` holds the study's settings of the capture and the fingerprint of each teacher. ``teacher`` is the model
    itself where the training loads it.
    """
    found = cache.facts["fingerprint"]
    asked = {
        "teacher": captured.teachers[name],
        "mix": mix.sha256,
        "tokenizer": tokenizer_sha256(load_tokenizer(cache, None)),
        **form(captured.capture),
    }
    if teacher is not None:
        asked["weights"] = teacher.sha256
    wrong = [
        f"{key}: captured with {_short(found.get(key))}, this training asks for {_short(value)}"
        for key, value in asked.items()
        if found.get(key) != value
    ]
    theirs, ours = cache.spec.get("chat_template"), chat_template
    if theirs != ours:
        wrong.append(
            f"chat_template: captured with {theirs or 'neutral'!r:.60}, the study's is {ours or 'neutral'!r:.60}"
        )
    if wrong:
        told = f" (revision {found['revision']})" if found.get("revision") else ""
        raise UserError(
            f"teacher {name}{told}: {cache.folder} is not the cache that this training needs: {'; '.join(wrong)}; capture it again"
        )


def _short(value: Any) -> str:
    return f"{value}"[:16]


def require_recomputed(name: str, cache: Cache, rows: dict[str, Tensor], head: Tensor, bias: Tensor | None) -> None:
    """Raise :class:`UserError` with the figure unless the labels' cross-entropy, computed again from ``rows``, is the cached one.

    Rows or a head of another teacher are sound by themselves and would only train badly. Allowed are 1e-5 nats (times the logits, where those are
    larger than 1: another device adds in another order); where a teacher is run again, what another padding or rounding to bfloat16 does.
    """
    rows = {key: tensor[:COMPARED] for key, tensor in rows.items()}
    labels, told = rows["label_id"].long(), rows["label_logprob"]
    if "top_id" in rows:
        there, lost = (
            rows["top_id"] == labels[:, None],
            1 - rows["top_logprob"].exp().sum(1) - rows["tail"],
        )  # (N, k), (N,)
        apart, size = torch.cat([(rows["top_logprob"] - told[:, None])[there], lost]).abs(), 1.0
    else:
        found = statistics(rows["hidden"], head, bias, labels, cache.facts["rows_of_head"])
        apart, size = (found["label_logprob"] - told).abs(), max(1.0, float(found["logsumexp"].abs().max()))
    coarse = cache.kind == "online" and cache.facts["fingerprint"]["dtype"] != "float32"
    gap = float(apart.mean() if coarse else apart.max())
    allowed = 5e-2 if coarse else (1e-4 if cache.kind == "online" else 1e-5) * size
    if not gap <= allowed:  # false for NaN, too
        how = (
            f"the labels' cross-entropy, computed again, is {gap:.3g} nats from the cached one (allowed: {allowed:.2g})"
        )
        raise UserError(
            f"teacher {name}: {cache.artifact.folder}: {how}: these rows or this head are not the ones captured; capture it again"
        )
