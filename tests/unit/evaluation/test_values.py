"""Values across the wall: plain ones come back in value, type and identity, everything else is refused."""

import contextlib
import json
import math
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfusion.evaluation import values
from llmfusion.evaluation.values import Decoder, Encoder, Malformed, NoPlainValue, Table

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes()
    | st.timedeltas()
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.tuples(inner)
        | st.sets(HASHABLE, max_size=3)
        | st.lists(inner, max_size=3).map(deque)
        | st.lists(HASHABLE, max_size=3).map(Counter)
    ),
    max_leaves=8,
)
Point = namedtuple("Point", "x y")
MONDAY = datetime(2024, 1, 1, 12, 30, 1, 5, tzinfo=timezone(timedelta(hours=2)))
OTHERS = [
    Point(1, [2]), range(5, 0, -2), slice(1, None, 2), bytearray(b"x"), array("d", [1.5, math.inf]), Ellipsis,
    NotImplemented, int, type(None), OrderedDict([(2, 1), (1, 2)]), defaultdict(list, {1: [2]}),
    deque([1, 2], maxlen=2), MONDAY, time(1, 2, fold=1), UTC, Decimal("-0.00"), Fraction(-1, 3), {1: 2}.keys(),
    {1: 2}.items(), date(1, 1, 1), 7**20_000, "\ud83d\udc00", "\udc80", (), frozenset({(1, 2)}),
]  # fmt: skip


class Node:
    """A class that both sides have."""

    def __init__(self, value: Any, rest: Any = None):
        self.value = value
        self.rest = rest


KNOWN: dict[str, type] = {"Node": Node}


def refuse(*given: Any) -> Any:
    if type(given[0]) is list:
        raise Malformed("a handle")
    raise NoPlainValue(type(given[0]).__name__)


def through(*given: Any) -> list[Any]:
    """The values on the other side, by way of JSON."""
    table = Table()
    encoder = Encoder(table, refuse, KNOWN)
    message = {"refs": [encoder.ref(value) for value in given], "nodes": encoder.nodes()}
    return built(values.loads(values.dumps(message)))


def built(message: dict[str, Any]) -> list[Any]:
    decoder = Decoder(Table(), refuse, KNOWN)
    decoder.decode(message["nodes"])
    return decoder.refs(message["refs"])


def types(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(types(k), types(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [types(v) for v in value]
    return type(value)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(VALUES)
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    (back,) = through(value)
    assert back == value
    assert types(back) == types(value)


@pytest.mark.parametrize("value", OTHERS, ids=range(len(OTHERS)))
def test_other_values_of_the_library_come_back_as_they_were(value: Any) -> None:
    (back,) = through(value)
    assert back == value
    assert repr(back)[:5000] == repr(value)[:5000] if not isinstance(value, int) else True
    assert type(back).__name__ == type(value).__name__


def test_nan_infinity_and_negative_zero_survive() -> None:
    nan, inf, zero, odd = through(math.nan, -math.inf, -0.0, complex(math.nan, -0.0))
    assert math.isnan(nan)
    assert inf == -math.inf
    assert math.copysign(1, zero) == -1
    assert math.isnan(odd.real)
    assert math.copysign(1, odd.imag) == -1


def test_parts_that_are_shared_or_contain_themselves_stay_so() -> None:
    row: list[Any] = [1]
    ring: dict[str, Any] = {"row": row}
    ring["me"] = (ring,)
    both, circle, same = through([row, row], ring, row)
    assert both[0] is both[1] is circle["row"] is same
    assert circle["me"][0] is circle
    node = Node(1)
    node.rest = node
    (back,) = through(node)
    assert type(back) is Node
    assert back.rest is back


def test_depth_has_no_limit() -> None:
    deep: Any = ()
    for _ in range(50_000):
        deep = [deep]
    (back,) = through(deep)
    depth = 0
    while back:
        back, depth = back[0], depth + 1
    assert depth == 50_000


def test_a_dictionary_keeps_its_factory_and_a_queue_its_length() -> None:
    counts, own, queue = through(defaultdict(int), defaultdict(lambda: 7, {1: 2}), deque([1, 2, 3], maxlen=2))
    assert counts["new"] == 0
    assert own == {1: 2}
    assert own.default_factory is None  # a function of the program does not come along
    assert queue.maxlen == 2


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "2"

    __index__ = __pos__ = __add__ = lambda self, *_: 2  # type: ignore[assignment]
    __hash__ = int.__hash__


class Shouter(str):
    encode = __str__ = __repr__ = isascii = lambda self, *_: "HELLO"  # type: ignore[assignment]


class Impostor(dict):
    def items(self) -> Any:
        raise AssertionError("a method of the value was called")


class Hidden(list):
    __iter__ = __len__ = None  # type: ignore[assignment]


class Cheap(Decimal):
    __str__ = __repr__ = lambda self: "2"  # type: ignore[assignment]


class Long(deque):
    __iter__ = lambda self: iter([2])  # type: ignore[assignment]  # noqa: E731


LYING = [
    (Liar(3), 3),
    (Liar(1 << 70), 1 << 70),
    (Shouter("hi"), "hi"),
    (Impostor({"a": [Liar(1)]}), {"a": [1]}),
    (Hidden([1, 2]), [1, 2]),
    (Cheap("7"), Decimal(7)),
    (Long([1]), deque([1])),
    (HTTPStatus.OK, 200),
]


@pytest.mark.parametrize(("value", "plain"), LYING, ids=range(len(LYING)))
def test_an_object_of_a_derived_class_is_told_as_its_plain_base_without_calling_its_methods(
    value: Any, plain: Any
) -> None:
    (back,) = through(value)
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    "value", [object(), len, {"a": object()}, (i for i in ()), Exception("x"), {1}.__iter__(), Liar]
)
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(NoPlainValue):
        through(value)


FORGED: list[tuple[Any, Any]] = [
    ([0], []),
    ([-1], [["list"]]),
    ([True], [["list"]]),
    (["0"], [["list"]]),
    ([0, 1], [["list"], ["list"]]),
    ([], [["list"]]),
    ({}, [["list"]]),
    ([[0]], [["list"]]),
    ([0], 3),
    ([0], [3]),
    ([0], [[]]),
    ([0], [[["list"]]]),
    ([0], [["pickle", "x"]]),
    ([0], [["int", "3"]]),
    ([0], [["int", 3]]),
    ([0], [["int", "0x_1"]]),
    ([0], [["float", "1e5"]]),
    ([0], [["float", None]]),
    ([0], [["complex"]]),
    ([0], [["complex", {}]]),
    ([0], [["complex", "1", "2"]]),
    ([0], [["bytes", "zz"]]),
    ([0], [["bytes", 7]]),
    ([0], [["str", "c3"]]),
    ([0], [["bytearray"]]),
    ([0], [["dict", 1]]),
    ([0], [["dict", [1], 1], ["list"]]),
    ([0], [["set", [1]], ["list"]]),
    ([0], [["frozenset", [1]], ["list"]]),
    ([0], [["tuple", [0]]]),
    ([0], [["tuple", [1]], ["frozenset", [0]]]),
    ([0], [["deque"]]),
    ([0], [["deque", -1]]),
    ([0], [["deque", "x"]]),
    ([0], [["defaultdict", "eval"]]),
    ([0], [["type", "__import__"]]),
    ([0], [["type", ["int"]]]),
    ([0], [["singleton", "None"]]),
    ([0], [["Decimal", "__import__"]]),
    ([0], [["Decimal", 1.5]]),
    ([0], [["Fraction", 1, 0]]),
    ([0], [["Fraction", 1.5, 2]]),
    ([0], [["date", 99999, 1, 1]]),
    ([0], [["datetime", None, 1]]),
    ([0], [["datetime", "utc", 1, 1, 1, 1, 1, 1, 1, 0]]),
    ([0], [["time", None, 25, 0, 0, 0, 0]]),
    ([0], [["timedelta", 10**12, 0, 0]]),
    ([0], [["timezone", 5]]),
    ([0], [["range", 1, 2, 0]]),
    ([0], [["range", "a"]]),
    ([0], [["array", "u", ""]]),
    ([0], [["array", "i", "00"]]),
    ([0], [["namedtuple", "P", ["x"]]]),
    ([0], [["namedtuple", "P", ["x", "x"], 1, 2]]),
    ([0], [["namedtuple", "P", ["class"], 1]]),
    ([0], [["namedtuple", "P", ["_x"], 1]]),
    ([0], [["namedtuple", "P(1)", ["x"], 1]]),
    ([0], [["namedtuple", "P", ["x=1"], 1]]),
    ([0], [["namedtuple", "P", [7], 1]]),
    ([0], [["instance", "Other"]]),
    ([0], [["instance", "Node", "x"]]),
    ([0], [["instance", "Node", "__class__", 1]]),
    ([0], [["instance", "Node", "x y", 1]]),
    ([0], [["member", "Node", "x"]]),
    ([0], [["known", "object"]]),
    ([0], [["import", "os", "system"]]),
    ([0], [["items", 1]]),
    ([0], [["keys", [1]], ["list"]]),
]


@pytest.mark.parametrize(("ref", "nodes"), FORGED, ids=range(len(FORGED)))
def test_a_forged_value_raises_and_nothing_else(ref: Any, nodes: Any) -> None:
    with pytest.raises(Malformed):
        built({"refs": [ref], "nodes": nodes})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([*values.SHELLS, *values.BUILDERS, ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(JSON, st.lists(st.lists(JSON, min_size=1), max_size=4))
def test_any_nodes_give_a_value_or_are_malformed(ref: Any, nodes: Any) -> None:
    with contextlib.suppress(Malformed):
        built({"refs": [ref], "nodes": nodes})


@pytest.mark.parametrize(
    "line", [b"[]", b"3", b"{", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000, b"\xff", b"", b'{"a": 1} {}']
)
def test_a_line_that_is_no_object_of_json_is_malformed(line: bytes) -> None:
    with pytest.raises(Malformed):
        values.loads(line)


def test_a_line_has_a_limit() -> None:
    with pytest.raises(OverflowError):
        values.dumps({"value": "x" * values.MAX_MESSAGE})


def test_all_that_is_sent_is_ascii_json() -> None:
    line = values.dumps({"value": "\u2028\ud800ä\n"})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"value": "\u2028\ud800ä\n"}
    line.decode("ascii")


def test_changes_are_made_to_the_very_argument_and_to_nothing_of_another_class() -> None:
    table = Table()
    argument = [1]
    number = table.add(argument)
    decoder = Decoder(table, refuse, KNOWN)
    decoder.decode([["set", 5]])
    decoder.change(number, ["list", [1], 2])
    assert argument == [{5}, 2]
    table.add((1,))
    for bad in (
        (0, ["dict"]),
        (0, ["tuple"]),
        (0, 3),
        (0, []),
        (2, ["tuple"]),
        (9, ["list"]),
        (-1, ["list"]),
        ("0", []),
    ):
        with pytest.raises(Malformed):
            decoder.change(*bad)
    assert argument == [{5}, 2]
