"""A cache of anything else than what a training asks for is refused, and what differs is named."""

import json
from typing import Any

import pytest

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import DamagedError, UserError
from llmfusion.models.scratch import make_tokenizer
from llmfusion.study.kinds.train_model import Captured
from llmfusion.study.schema.base_models import Tokenizer
from llmfusion.study.schema.settings import Capture
from llmfusion.teachers.capture import capture
from llmfusion.teachers.fingerprint import fingerprint, require_same, tokenizer_sha256
from tests.unit.stand_ins import artifact


def captured(**options: Any) -> Captured:
    """What a training asks for whose teacher was captured with these options."""
    return Captured(capture=Capture(**{"dtype": "float32", **options}), teachers={"base/t": "f" * 64})


def changed(cache, **entries):
    """The cache with other entries in its fingerprint."""
    facts = {**cache.facts, "fingerprint": {**cache.facts["fingerprint"], **entries}}
    return Artifact(cache.folder, {**cache.manifest, "facts": facts}, cache.sha256)


def refused(cache, mix, asked=None, teacher=None, chat_template=None):
    """The message with which a training refuses the cache."""
    with pytest.raises(UserError) as caught:
        require_same("base/t", cache, mix, asked or captured(), chat_template, teacher)
    return str(caught.value)


def test_the_cache_that_was_asked_for_is_accepted(cache, mix, teacher):
    require_same("base/t", cache, mix, captured(), None, teacher)
    require_same("base/t", cache, mix, captured(batch_size=99), None, None)  # says nothing about the rows


def test_each_thing_that_differs_is_named(cache, mix, teacher):
    cases = {
        "teacher": refused(changed(cache, teacher="a" * 64), mix),
        "mix": refused(cache, Artifact(mix.folder, mix.manifest, "1" * 64)),
        "tokenizer": refused(changed(cache, tokenizer="b" * 64), mix),
        "dtype": refused(cache, mix, captured(dtype="bfloat16")),
        "kind": refused(cache, mix, captured(kind="online"), teacher),
        "k": refused(cache, mix, captured(kind="topk", k=5)),
        "weights": refused(cache, mix, None, Artifact(teacher.folder, teacher.manifest, "2" * 64)),
        "chat_template": refused(cache, mix, chat_template="{{ messages }}"),
    }
    for name, message in cases.items():
        assert message.startswith(f"teacher base/t: {cache.folder} is not the cache that this training needs: "), (
            message
        )
        assert f"{name}: captured with " in message, message
        others = [other for other in cases if f" {other}: captured with " in message and other != name]
        assert others == (["kind"] if name == "k" else []), message
    assert f"teacher: captured with {'a' * 16}, this training asks for {'f' * 16}" in cases["teacher"]
    assert "dtype: captured with float32, this training asks for bfloat16" in cases["dtype"]


def test_all_differences_are_told_at_once_with_the_revision(cache, mix):
    message = refused(
        changed(cache, teacher="a" * 64, revision="c" * 40),
        Artifact(mix.folder, mix.manifest, "1" * 64),
        captured(dtype="bfloat16"),
    )
    assert message.startswith(f"teacher base/t (revision {'c' * 40}): ")
    assert [word for word in ("teacher:", "mix:", "dtype:") if word in message] == ["teacher:", "mix:", "dtype:"]


def test_a_cache_of_unknown_origin_is_refused(cache, mix):
    facts = {key: value for key, value in cache.facts.items() if key != "fingerprint"}
    with pytest.raises(DamagedError, match="says nothing of 'fingerprint'"):
        require_same("base/t", artifact(cache.folder, **facts), mix, captured(), None, None)


def test_the_fingerprint_tells_teacher_revision_tokenizer_and_mix(teacher, mix, tokenizer, tmp_path):
    staged = Artifact(
        teacher.folder,
        {**teacher.manifest, "spec": json.dumps({"base": {"kind": "hub", "revision": "d" * 40}})},
        "3" * 64,
    )
    facts = capture(staged, mix, tmp_path, Capture(kind="topk", k=3), None)["fingerprint"]
    assert facts == {
        "teacher": "f" * 64,
        "weights": "3" * 64,
        "revision": "d" * 40,
        "tokenizer": tokenizer_sha256(tokenizer),
        "mix": "0" * 64,
        "dtype": "bfloat16",
        "kind": "topk",
        "k": 3,
    }
    other = make_tokenizer(Tokenizer(vocabulary_size=290), mix.file("samples.jsonl"), None)
    assert fingerprint(staged, mix, other, Capture())["tokenizer"] != facts["tokenizer"]


def test_an_added_token_or_another_template_is_another_tokenizer(mix):
    one, other, third = (
        make_tokenizer(Tokenizer(vocabulary_size=290), mix.file("samples.jsonl"), None) for _ in range(3)
    )
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    other.add_tokens(["<more>"])
    third.chat_template = "{{ messages }}"
    assert len({tokenizer_sha256(t) for t in (one, other, third)}) == 3
