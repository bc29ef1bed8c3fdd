"""Tagged JSON: plain values go through unchanged in value and type, everything else is refused."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfusion.evaluation.candidate import MAX_DEPTH, decode, encode

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=3) | st.tuples(inner) | st.sets(HASHABLE, max_size=3),
    max_leaves=8,
)


def types(value: Any) -> Any:
    if isinstance(value, dict):
        return [(types(k), types(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [types(v) for v in value]
    return type(value)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(VALUES)
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert types(back) == types(value)


def test_nan_infinity_and_negative_zero_survive() -> None:
    nan, inf, zero = decode(encode([math.nan, -math.inf, -0.0]))
    assert math.isnan(nan)
    assert inf == -math.inf
    assert math.copysign(1, zero) == -1


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "2"

    __hash__ = int.__hash__


class Impostor(dict):
    def items(self) -> Any:
        raise AssertionError("a method of the value was called")


@pytest.mark.parametrize("value", [Liar(3), [Liar(3)], Impostor(), object(), int, len, bytearray(b"x"), range(3), {"a": Liar(1)}, (i for i in ())])
def test_a_value_with_methods_of_its_own_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="no plain value"):
        encode(value)


def test_depth_is_limited_both_ways() -> None:
    deep: Any = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(encode(deep)) == deep
    tagged = {"list": [encode(deep)]}
    for call in (lambda: encode([deep]), lambda: decode(tagged)):
        with pytest.raises(ValueError, match="nested too deeply"):
            call()
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(endless)


@pytest.mark.parametrize(
    "forged",
    [3, 2.5, [1], {}, {"i": 3}, {"i": "3", "f": "1"}, {"pickle": "x"}, {"i": "three"}, {"b": "zz"}, {"f": None}, {"c": []}, {"dict": [1]},
     {"dict": [[{"list": []}, None]]}, {"set": [{"list": []}]}, {"list": 3}, {"i": "9" * 5000}],
)  # fmt: skip
def test_a_forged_value_raises_and_nothing_else(forged: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        decode(forged)
