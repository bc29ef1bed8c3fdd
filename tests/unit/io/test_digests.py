"""Canonical JSON and its hash."""

import hashlib

import pytest

from llmfusion.io.digests import canonical, digest


def test_canonical_json_has_one_spelling_and_no_nan() -> None:
    assert canonical({"b": [1, 0.1], "a": "é"}) == '{"a":"\\u00e9","b":[1,0.1]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
    assert digest("a", "b") == hashlib.sha256(b"a\nb").hexdigest()
