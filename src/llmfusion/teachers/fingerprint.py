"""What a cache was captured from: a training refuses a cache captured from anything else, and names what differs."""

from typing import Any

import torch
from torch import Tensor

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.io.digests import canonical, digest
from llmfusion.models.loading import load_tokenizer, vocabulary_sha256
from llmfusion.study.kinds.train_model import Captured
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.cache import TeacherCache
from llmfusion.teachers.statistics import statistics

COMPARED_ROWS = 64  # of the first batch: enough to tell teachers apart, and little memory beside a large vocabulary


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that turns a conversation into ids: vocabulary with added tokens, merges, chat template."""
    return digest(
        vocabulary_sha256(tokenizer), canonical(sorted(tokenizer.get_vocab().items())), tokenizer.chat_template or ""
    )


def fingerprint(teacher: Artifact, mix: Artifact, tokenizer: Any, capture: Capture) -> dict[str, Any]:
    """The fingerprint that a cache's manifest holds.

    ``teacher`` is the fingerprint of the spec that made the model, ``weights`` the hash of its manifest.
    """
    return {
        "teacher": teacher.manifest["fingerprint"],
        "weights": teacher.sha256,
        "revision": teacher.spec.get("base", {}).get("revision"),  # of a model staged from the hub
        "tokenizer": tokenizer_sha256(tokenizer),
        "mix": mix.sha256,
        **row_format(capture),
    }


def row_format(capture: Capture) -> dict[str, Any]:
    """The part of the capture's options that changes the rows."""
    k = {"k": capture.k} if capture.kind == "topk" else {}
    return {"dtype": capture.dtype, "kind": capture.kind, **k}


def require_same(
    name: str, cache: Artifact, mix: Artifact, captured: Captured, chat_template: str | None, teacher: Artifact | None
) -> None:
    """Raise :class:`UserError` naming everything in which a teacher's cache is not the one that a training asks for.

    ``captured`` holds the study's options of the capture and the fingerprint of each teacher, ``chat_template`` is the
    study's, ``teacher`` the model itself where the training loads it.
    """
    stored = cache.facts["fingerprint"]
    expected = {
        "teacher": captured.teachers[name],
        "mix": mix.sha256,
        "tokenizer": tokenizer_sha256(load_tokenizer(cache, None)),
        **row_format(captured.capture),
    }
    if teacher is not None:
        expected["weights"] = teacher.sha256
    differences = [
        f"{key}: captured with {_short(stored.get(key))}, this training asks for {_short(value)}"
        for key, value in expected.items()
        if stored.get(key) != value
    ]
    differences += _template_difference(cache.spec.get("chat_template"), chat_template)
    if differences:
        revision = f" (revision {stored['revision']})" if stored.get("revision") else ""
        raise UserError(
            f"teacher {name}{revision}: {cache.folder} is not the cache that this training needs: "
            f"{'; '.join(differences)}; capture it again"
        )


def _template_difference(stored: str | None, expected: str | None) -> list[str]:
    if stored == expected:
        return []
    return [
        f"chat_template: captured with {stored or 'neutral'!r:.60}, the study's is {expected or 'neutral'!r:.60}",
    ]


def _short(value: Any) -> str:
    return f"{value}"[:16]


def require_recomputed(
    name: str, cache: TeacherCache, rows: dict[str, Tensor], head: Tensor, bias: Tensor | None
) -> None:
    """Raise :class:`UserError` unless the labels' cross-entropy, recomputed from ``rows``, is the cached one.

    Rows or a head of another teacher are sound by themselves and would only train badly. Allowed are 1e-5 nats (times
    the logits, where those are larger than 1: another device adds in another order); where a teacher is run again,
    what another padding or rounding to bfloat16 does.
    """
    difference, scale = _recomputed_difference(
        cache, {key: part[:COMPARED_ROWS] for key, part in rows.items()}, head, bias
    )
    is_online = cache.kind == "online"
    is_coarse = is_online and cache.facts["fingerprint"]["dtype"] != "float32"
    nats = float(difference.mean() if is_coarse else difference.max())
    allowed = 5e-2 if is_coarse else (1e-4 if is_online else 1e-5) * scale
    if not nats <= allowed:  # also for a NaN
        figure = f"computed again, is {nats:.3g} nats from the cached one (allowed: {allowed:.2g})"
        raise UserError(
            f"teacher {name}: {cache.artifact.folder}: the labels' cross-entropy, {figure}: "
            "these rows or this head are not the ones captured; capture it again"
        )


def _recomputed_difference(
    cache: TeacherCache, rows: dict[str, Tensor], head: Tensor, bias: Tensor | None
) -> tuple[Tensor, float]:
    """Absolute differences (nats) from the labels' cached log-probabilities, and the size of the logits, at least 1."""
    labels = rows["label_id"].long()
    cached = rows["label_logprob"]
    if "top_id" in rows:
        is_label = rows["top_id"] == labels[:, None]  # (N, k)
        missing_mass = 1 - rows["top_logprob"].exp().sum(1) - rows["tail"]  # (N,)
        return torch.cat([(rows["top_logprob"] - cached[:, None])[is_label], missing_mass]).abs(), 1.0
    recomputed = statistics(rows["hidden"], head, bias, labels, cache.facts["rows_of_head"])
    difference = (recomputed["label_logprob"] - cached).abs()
    return difference, max(1.0, float(recomputed["logsumexp"].abs().max()))
