"""Tagged JSON: plain values go through unchanged in value and type, everything else is refused."""

import json
import math
from collections import Counter
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfusion.evaluation.candidate import MAX_DEPTH, encode
from llmfusion.evaluation.judge import decode

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.tuples(inner)
        | st.sets(HASHABLE, max_size=3)
    ),
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
    back = decode(json.loads(encode(value)))
    assert back == value
    assert types(back) == types(value)


def test_nan_infinity_and_negative_zero_survive() -> None:
    nan, inf, zero = decode(json.loads(encode([math.nan, -math.inf, -0.0])))
    assert math.isnan(nan)
    assert inf == -math.inf
    assert math.copysign(1, zero) == -1


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "2"

    __hash__ = int.__hash__


class Shouter(str):
    encode = __str__ = __repr__ = lambda self, *_: "HELLO"  # type: ignore[assignment]


class Impostor(dict):
    def items(self) -> Any:
        raise AssertionError("a method of the value was called")


class Hidden(list):
    __iter__ = __len__ = None  # type: ignore[assignment]


LYING = [
    (Liar(3), 3),
    (Shouter("hi"), "hi"),
    (Impostor({"a": [Liar(1)]}), {"a": [1]}),
    (Hidden([1, 2]), [1, 2]),
    (bytearray(b"x"), b"x"),
]
LYING += [(Counter("aab"), {"a": 2, "b": 1}), (HTTPStatus.OK, 200)]


@pytest.mark.parametrize(("value", "plain"), LYING, ids=range(len(LYING)))
def test_an_object_of_a_derived_class_is_told_as_its_plain_base_without_calling_its_methods(
    value: Any, plain: Any
) -> None:
    back = decode(json.loads(encode(value)))
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    "value", [object(), int, len, range(3), {"a": object()}, (i for i in ()), Exception("x"), {1}.__iter__()]
)
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="no plain value"):
        encode(value)


def test_depth_is_limited_both_ways() -> None:
    deep: Any = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(json.loads(encode(deep))) == deep
    tagged = {"list": [json.loads(encode(deep))]}
    for call in (lambda: encode([deep]), lambda: decode(tagged)):
        with pytest.raises(ValueError, match="nested too deeply"):
            call()
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(endless)


@pytest.mark.parametrize(
    "forged",
    [
        3,
        2.5,
        [1],
        {},
        {"int": 3},
        {"int": "3", "float": "1"},
        {"pickle": "x"},
        {"int": "three"},
        {"bytes": "zz"},
        {"float": None},
        {"complex": []},
        "plain text",
        {"str": "c3"},
        {"str": 7},
        {"dict": [1]},
        {"dict": [[{"list": []}, None]]},
        {"set": [{"list": []}]},
        {"list": 3},
        {"int": "9" * 5000},
    ],
)
def test_a_forged_value_raises_and_nothing_else(forged: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        decode(forged)
