"""What hashes cannot see in a teacher's cache: broken chunks, head and index under an honest manifest."""

import re
from pathlib import Path

import pytest

from llmfusion.artifacts import store
from llmfusion.errors import UserError
from tests.e2e.damage.finished import CACHE, KD, MIX, PIVOT, RESULTS, Make, manifest_path, remake
from tests.e2e.damage.spoil import Cases, cases, cast, cut, parquet, put, rewrite, tensors, unlink

FIRST, HEAD, INDEX = "piece-00000.safetensors", "head.safetensors", "index.parquet"
ALL = ("hidden", "label_id", "label_logprob", "entropy", "logsumexp")
NAN = float("nan")
FLOATS = "expected F32 or BF16 or F16"
CHUNK = cases(
    tensors,
    FIRST,
    {
        **{
            f"a NaN in {name}": (
                put(name, (77,), NAN),
                f": tensor {name} is not finite in the rows of sample [0-9a-f]{{40}}",
            )
            for name in ALL
            if name != "label_id"
        },
        "infinity": (put("hidden", (77, 3), float("inf")), ": tensor hidden is not finite in the rows of sample"),
        **{
            f"no {name}": (lambda t, name=name: t.pop(name), f": tensor {name}: expected .*, found none")
            for name in ALL
        },
        "a tensor too many": (lambda t: t.update(more=t["entropy"] + 1), ": tensor more: not part of a teacher cache"),
        "one row too few": (cut(*ALL), r": tensor hidden: expected .* \[\d+, 64\], found F32 \[\d+, 64\]"),
        "one state too few": (cut("hidden"), ": tensor hidden: expected"),
        "one label too few": (cut("label_id"), r": tensor label_id: expected I32 \[\d+\], found I32 \[\d+\]"),
        "narrow states": (
            lambda t: t.update(hidden=t["hidden"][:, :-1]),
            r": tensor hidden: expected .* 64\], found F32 \[\d+, 63\]",
        ),
        "integer states": (cast("hidden", "int32"), f": tensor hidden: {FLOATS} .*, found I32"),
        "labels of another kind": (cast("label_id", "float32"), r": tensor label_id: expected I32 .*, found F32"),
    },
    CACHE,
)
HEADS = cases(
    tensors,
    HEAD,
    {
        "a NaN in the head": (put("weight", (5, 6), NAN), ": tensor weight is not finite"),
        "no head": (
            lambda t: t.update(other=t.pop("weight")),
            ": tensor weight: expected 400 rows of numbers or more, found",
        ),
        "a shorter head": (cut("weight"), r": tensor weight: expected 400 rows of numbers or more, found \[399, 64\]"),
        "a head of integers": (
            cast("weight", "int32"),
            rf": tensor weight: {FLOATS} \[400, 64\], found I32 \[400, 64\]",
        ),
        "a bias of another length": (
            lambda t: t.update(bias=t["weight"][:9, 0]),
            r": tensor bias: expected .* \[400\], found F32 \[9\]",
        ),
        "short embeddings": (
            lambda t: t.update(embedding=t["weight"][:9] + 1),
            r": tensor embedding: expected 400 rows of numbers or more, found \[9, 64\]",
        ),
        "narrow embeddings": (
            lambda t: t.update(embedding=t["weight"][:, :9] + 1),
            r": tensor embedding: expected .* \[400, 64\], found F32 \[400, 9\]",
        ),
        "a NaN in the embeddings": (
            lambda t: t.update(embedding=t["weight"] + NAN),
            ": tensor embedding is not finite",
        ),
    },
    CACHE,
)
ROWS = cases(
    parquet,
    INDEX,
    {
        "a sample too few": (lambda rows: rows.pop(7), r": expected (\d+) samples as the manifest tells, found \d+"),
        "a sample twice": (
            lambda rows: rows.__setitem__(7, rows[8]),
            r": expected \d+ samples .*, found \d+ in \d+ rows",
        ),
        "no column length": (
            lambda rows: [row.pop("length") for row in rows],
            ", row 0: length: found None; expected id, piece, start, length",
        ),
        "no texts to compare": (
            lambda rows: rows[7].update(response_sha256=None),
            ", row 7: response_sha256: found None",
        ),
        "no segments": (lambda rows: rows[7].update(segment_starts=[]), r", row 7: segment_starts: found \[\]"),
        "a null in the index": (lambda rows: rows[7].update(start=None), ", row 7: start: found None"),
    },
    CACHE,
)
OTHER: Cases = {
    case: (parquet(INDEX, change), message)
    for case, (change, message) in {
        "a sample of another name": (lambda rows: rows[7].update(id="another"), "has no rows for sample [0-9a-f]{40}"),
        "a sample that is too long": (
            lambda rows: rows[-1].update(length=rows[-1]["length"] + 9),
            rf"{CACHE}/piece-00001\.safetensors: tensor hidden: expected",
        ),
        "a sample that is too short": (
            lambda rows: rows[7].update(length=3),
            "its cached labels are not the student's",
        ),
    }.items()
}
CACHES: Cases = {
    **CHUNK,
    **HEADS,
    **ROWS,
    **OTHER,
    **cases(
        rewrite,
        FIRST,
        {
            "half a chunk's header": (lambda c: c[:200], ": no safetensors header"),
            "half a chunk": (lambda c: c[: len(c) // 2], r": tensor \S+ ends at byte"),
        },
        CACHE,
    ),
    **cases(rewrite, HEAD, {"half a head": (lambda c: c[:-1], ": tensor weight ends at byte")}, CACHE),
    **cases(
        rewrite,
        INDEX,
        {
            "half an index": (lambda c: c[: len(c) // 2], ": cannot be read as Parquet"),
            "an index of zeros": (lambda c: bytes(len(c)), ": cannot be read as Parquet"),
        },
        CACHE,
    ),
    "no chunk": (unlink(FIRST), f"lists no file '{FIRST}'"),
}


def use_cache() -> None:
    """Everything a training takes from the cache: head, embeddings, and the rows of every sample of the mix."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_samples
    from llmfusion.fusion.teacher import CachedTeacher
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(RESULTS / PIVOT, None)
    teacher = CachedTeacher("base/code", store.read(manifest_path(CACHE)), tokenizer, 400, "cpu")
    teacher.cache.embedding()
    for sample in read_samples(RESULTS / MIX / "samples.jsonl"):
        teacher.distribution([sample], [encode(sample, tokenizer, 128).label_ids])  # type: ignore[union-attr]


def test_a_sound_teacher_cache_is_used(study: Path) -> None:
    remake(CACHE)
    use_cache()


@pytest.mark.parametrize("case", CACHES)
def test_a_broken_teacher_cache_is_refused_by_file_and_tensor(study: Path, case: str) -> None:
    spoil, message = CACHES[case]
    remake(CACHE, spoil)
    with pytest.raises(UserError, match=message):
        use_cache()


@pytest.mark.parametrize("case", ["a NaN in hidden", "no entropy", "a sample too few", "a NaN in the head"])
def test_no_training_begins_or_goes_on_with_a_broken_teacher_cache(message_of_step: Make, case: str) -> None:
    spoil, message = CACHES[case]
    remake(CACHE, spoil)
    assert re.search(message, message_of_step(KD))


def test_a_fact_that_a_step_needs_and_the_manifest_lacks_is_named(message_of_step: Make) -> None:
    remake(CACHE, rows_of_head=...)
    message = message_of_step(KD)
    assert message.startswith(f"results/{CACHE}: the manifest of {CACHE} says nothing of 'rows_of_head'")
