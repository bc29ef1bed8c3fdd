"""Values on their way between a test and a program: a table of tagged nodes in plain JSON, the same on both sides.

An atom (null, true, false, a number, a text) stands for itself; everything else is a node ``[tag, part, ...]`` in the
table of its message, and ``[7]`` names node 7. So values may be deep, may share parts and may contain themselves, and
an answer can name an argument: what a call changes in place is told by the nodes that changed.

Nothing that comes out of the sandbox is trusted: every node is checked, values are built by the methods of their plain
classes, and an object of a derived class counts as its plain base, read by the base's methods: its own are never
called. What is no plain value (a function, an iterator, an instance of the program's own class) stays where it is and
is named by a handle, see :mod:`llmfusion.evaluation.peer`. Standard library only: this also runs inside the sandbox.
"""

import array
import builtins
import collections
import datetime
import decimal
import fractions
import json
import math
import re
import types
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 32_000_000  # bytes of one line
MAX_FIELDS = 100  # of a named tuple
MAX_TEXT = 2_000  # characters of an exception's own text
INLINE = 1 << 63  # integers beyond are told in hexadecimal digits, which have no limit and take linear time
IDENTIFIER = re.compile(r"[^\W\d]\w{0,99}", re.ASCII)
DECIMAL = re.compile(r"-?(\d+(\.\d+)?([Ee][+-]?\d{1,18})?|Infinity|s?NaN\d*)")
HEXADECIMAL = re.compile(r"-?0x[0-9a-f]+")
TYPECODES = "bBhHiIlLqQfd"
UNBUILT = object()
Ref = Any  # an atom, or [number]
Node = list[Any]  # [tag, part, ...]
ENDLESS = ("Infinity", "-Infinity", "NaN")

TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
TYPES |= {
    kind.__name__: kind
    for kind in (
        type(None),
        type(...),
        type(NotImplemented),
        types.FunctionType,
        types.GeneratorType,
        array.array,
        collections.deque,
        collections.defaultdict,
        collections.Counter,
        collections.OrderedDict,
        decimal.Decimal,
        fractions.Fraction,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
    )
}
NAMES_OF_TYPES = {kind: name for name, kind in TYPES.items()}
SINGLETONS = {"Ellipsis": ..., "NotImplemented": NotImplemented}
VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
mro_of = type.__dict__["__mro__"].__get__  # the true ones, whatever a metaclass says
members_of = type.__dict__["__dict__"].__get__
plain_name_of = type.__dict__["__name__"].__get__
EXACT: dict[type, Callable[[Any], Any]] = {int: int.__pos__, float: float.__pos__, str: str.__str__}


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class NoPlainValue(ValueError):
    """A value that is neither plain nor can be named by a handle; the text tells its class."""


class Malformed(ValueError):
    """A message that no honest side sends."""


class Table:
    """The objects of one call and its answer by number; it keeps them alive, so that an id stays theirs."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def add(self, value: Any) -> int:
        """The number of an object, new or known."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return number


def dumps(message: dict[str, Any]) -> bytes:
    """One line of JSON."""
    line = ENCODER.encode(message)
    if len(line) >= MAX_MESSAGE:
        raise OverflowError("a value too long to be told")
    return line.encode("ascii") + b"\n"


def loads(line: bytes) -> dict[str, Any]:
    """The object of one line. Raises :class:`Malformed` for anything else, NaN and Infinity included."""
    try:
        message = DECODER.decode(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Malformed("no proper JSON") from None
    return _checked(message, dict)


def class_name(kind: type) -> str:
    """The name that a class was given, whatever its metaclass says; never longer than 100 characters."""
    return str.__str__(plain_name_of(kind))[:100]


# Encoding -------------------------------------------------------------------------------------------------------------


class Encoder:
    """Nodes of values. ``offer`` gives a handle's node for what is no plain value, and raises :class:`NoPlainValue`.

    ``known`` are classes that both sides have, by name: their instances go by value.
    """

    def __init__(self, table: Table, offer: Callable[[Any], Node], known: dict[str, type]):
        self.table = table
        self.offer = offer
        self.names = {kind: name for name, kind in known.items()}
        self.told = len(table.objects)  # nodes of all objects before are known to the other side

    def ref(self, value: Any) -> Ref:
        """What stands for a value in a node."""
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int and -INLINE < value < INLINE:
            return value
        if kind is float and math.isfinite(value):
            return value
        if kind is str and _is_proper(value):
            return value
        if issubclass(kind, (int, float, str)) and kind not in self.names:
            return self._scalar(value, kind)
        return [self.table.add(value)]

    def refs(self, items: Any) -> list[Ref]:
        """What stands for each of many values; long lists of plain numbers or texts are the common case."""
        items = list(items)
        return items if _are_atoms(items) else [self.ref(item) for item in items]

    def _scalar(self, value: Any, kind: type) -> Ref:
        plain = next(base for base in (int, float, str) if issubclass(kind, base))
        exact = EXACT[plain](value)
        return self.ref(exact) if kind is not plain else [self.table.add(value)]

    def nodes(self) -> list[Node]:
        """The nodes of all objects that the other side does not know yet."""
        out: list[Node] = []
        while self.told < len(self.table.objects):
            self.told += 1
            out.append(self.node(self.table.objects[self.told - 1]))
        return out

    def node(self, value: Any) -> Node:
        """The node of one object; what it refers to is added to the table."""
        kind = type(value)
        if kind in self.names and not issubclass(kind, (tuple, BaseException)):
            return self._instance(value, self.names[kind])
        for base in mro_of(kind):
            if base in WRITERS:
                return WRITERS[base](value, self)
        return self.offer(value)

    def _instance(self, value: Any, name: str) -> Node:
        if "_member_map_" in members_of(type(value)):  # of an enumeration
            return ["member", name, self.ref(value._name_)]
        parts: list[Ref] = []
        for attribute, part in attributes_of(value):
            parts += (attribute, self.ref(part))
        return ["instance", name, *parts]


Writer = Callable[[Any, Encoder], Node]


def _are_atoms(items: list[Any]) -> bool:
    """Whether :meth:`Encoder.ref` would leave all these as they are; a quick no is no mistake."""
    kinds = set(map(type, items))
    if kinds == {str}:
        return all(map(str.isascii, items))
    if not kinds or not kinds <= {int, float, bool}:
        return not kinds
    try:
        return all(map(math.isfinite, items)) and min(items) > -INLINE and max(items) < INLINE
    except OverflowError:  # an integer beyond all floats
        return False


def _is_proper(text: str) -> bool:
    """Without halves of surrogate pairs, which JSON would join."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """Names and values of an instance's attributes, in its dictionary or in slots."""
    found = dict(object.__getattribute__(value, "__dict__")) if hasattr(value, "__dict__") else {}
    for base in mro_of(type(value)):
        slots = members_of(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                found[slot] = getattr(value, slot)
    return [(str.__str__(name), part) for name, part in found.items()]


def _write_number(value: Any, encoder: Encoder) -> Node:
    if isinstance(value, int):
        return ["int", hex(value)]
    return ["float", {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")]


def _write_tuple(value: Any, encoder: Encoder) -> Node:
    parts = encoder.refs(tuple.__iter__(value))
    for base in mro_of(type(value)):
        fields = members_of(base).get("_fields")
        if type(fields) is tuple and len(fields) == len(parts) and all(type(name) is str for name in fields):
            return ["namedtuple", class_name(type(value)), list(fields), *parts]
    return ["tuple", *parts]


def _sequence(tag: str, base: Any) -> Writer:
    return lambda value, encoder: [tag, *encoder.refs(base.__iter__(value))]


def _pairs(base: Any) -> Writer:
    def write(value: Any, encoder: Encoder) -> Node:
        parts: list[Ref] = []
        for key, part in base.items(value):
            parts += (encoder.ref(key), encoder.ref(part))
        return [base.__name__, *parts]

    return write


def _write_defaultdict(value: Any, encoder: Encoder) -> Node:
    factory = members_of(collections.defaultdict)["default_factory"].__get__(value)
    name = NAMES_OF_TYPES.get(factory) if isinstance(factory, type) else None
    return ["defaultdict", name, *_pairs(dict)(value, encoder)[1:]]


def _write_deque(value: Any, encoder: Encoder) -> Node:
    longest = collections.deque.maxlen.__get__(value)
    return ["deque", longest, *encoder.refs(collections.deque.__iter__(value))]


def _write_view(value: Any, encoder: Encoder) -> Node:
    tag = VIEWS[type(value)]
    parts = list(value) if tag != "items" else [part for pair in value for part in pair]
    return [tag, *(encoder.ref(part) for part in parts)]


def _write_type(value: Any, encoder: Encoder) -> Node:
    if value in encoder.names:
        return ["known", encoder.names[value]]
    name = NAMES_OF_TYPES.get(value) if type(value) is type else None
    return encoder.offer(value) if name is None else ["type", name]


def _write_fraction(value: Any, encoder: Encoder) -> Node:
    slots = members_of(fractions.Fraction)
    return ["Fraction", *(encoder.ref(slots[part].__get__(value)) for part in ("_numerator", "_denominator"))]


def _write_datetime(value: Any, encoder: Encoder) -> Node:
    zone = datetime.datetime.tzinfo.__get__(value)
    parts = ("year", "month", "day", "hour", "minute", "second", "microsecond", "fold")
    return ["datetime", encoder.ref(zone), *(getattr(datetime.datetime, part).__get__(value) for part in parts)]


def _write_time(value: Any, encoder: Encoder) -> Node:
    zone = datetime.time.tzinfo.__get__(value)
    parts = ("hour", "minute", "second", "microsecond", "fold")
    return ["time", encoder.ref(zone), *(getattr(datetime.time, part).__get__(value) for part in parts)]


def _fields(kind: Any, *names: str) -> Writer:
    return lambda value, encoder: [kind.__name__, *(encoder.ref(getattr(kind, n).__get__(value)) for n in names)]


WRITERS: dict[Any, Writer] = {
    int: _write_number,
    float: _write_number,
    str: lambda value, encoder: ["str", value.encode("utf-8", "surrogatepass").hex()],
    complex: _fields(complex, "real", "imag"),
    bytes: lambda value, encoder: ["bytes", bytes.hex(value)],
    bytearray: lambda value, encoder: ["bytearray", bytearray.hex(value)],
    memoryview: lambda value, encoder: ["memoryview", memoryview.tobytes(value).hex()],
    list: _sequence("list", list),
    tuple: _write_tuple,
    set: _sequence("set", set),
    frozenset: _sequence("frozenset", frozenset),
    collections.defaultdict: _write_defaultdict,
    collections.Counter: lambda value, encoder: ["Counter", *_pairs(dict)(value, encoder)[1:]],
    collections.OrderedDict: _pairs(collections.OrderedDict),
    dict: _pairs(dict),
    collections.deque: _write_deque,
    range: _fields(range, "start", "stop", "step"),
    slice: _fields(slice, "start", "stop", "step"),
    array.array: lambda value, encoder: [
        "array",
        array.array.typecode.__get__(value),
        array.array.tobytes(value).hex(),
    ],
    decimal.Decimal: lambda value, encoder: ["Decimal", decimal.Decimal.__str__(value)],
    fractions.Fraction: _write_fraction,
    datetime.datetime: _write_datetime,
    datetime.date: _fields(datetime.date, "year", "month", "day"),
    datetime.time: _write_time,
    datetime.timedelta: _fields(datetime.timedelta, "days", "seconds", "microseconds"),
    datetime.timezone: lambda value, encoder: ["timezone", encoder.ref(datetime.timezone.utcoffset(value, None))],
    type: _write_type,
    **dict.fromkeys(VIEWS, _write_view),
    **{type(one): lambda value, encoder: ["singleton", repr(value)] for one in SINGLETONS.values()},
}


# Decoding -------------------------------------------------------------------------------------------------------------


def _checked(value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise Malformed(f"expected {kind.__name__}")
    return value


class Decoder:
    """Objects of nodes; ``accept`` makes one of a handle's node. Raises :class:`Malformed` for all that is improper."""

    def __init__(self, table: Table, accept: Callable[[Node, Any], Any], known: dict[str, type]):
        self.table = table
        self.accept = accept
        self.known = known
        self.kinds: dict[tuple[str, ...], Any] = {}  # of named tuples

    def decode(self, nodes: Any) -> None:
        """Build the objects of all nodes; they get the next numbers of the table."""
        try:
            self._decode(_checked(nodes, list))
        except Malformed:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None

    def _decode(self, nodes: list[Node]) -> None:
        start = len(self.table.objects)
        for node in nodes:
            if not _checked(node, list) or type(node[0]) is not str:
                raise Malformed("a node without a tag")
        self.table.objects += [self._shell(node) for node in nodes]
        for number in range(start, len(self.table.objects)):
            self._build(number, nodes, start)
        for late in (False, True):  # sets and keys last: their parts must be whole to be hashed
            for node, value in zip(nodes, self.table.objects[start:], strict=True):
                if node[0] in FILLERS and (node[0] in HASHING) is late:
                    self.fill(value, node)
        for number in range(start, len(self.table.objects)):
            self.table.numbers[id(self.table.objects[number])] = number

    def _shell(self, node: Node) -> Any:
        """An empty object of a class whose parts may contain it; of others, nothing yet."""
        if node[0] == "deque":
            return collections.deque(maxlen=None if node[1] is None else _checked(node[1], int))
        if node[0] == "defaultdict":
            return collections.defaultdict(None if node[1] is None else TYPES[_checked(node[1], str)])
        if node[0] == "array":
            return array.array(node[1] if node[1] in tuple(TYPECODES) else _checked(None, str))
        if node[0] == "instance":
            kind = self._known(node[1])
            if "_member_map_" in members_of(kind):
                raise Malformed("a new member of an enumeration")
            return object.__new__(kind)
        return SHELLS[node[0]]() if node[0] in SHELLS else UNBUILT

    def _known(self, name: Any) -> Any:
        if _checked(name, str) not in self.known:
            raise Malformed("no class that both sides have")
        return self.known[name]

    def _build(self, number: int, nodes: list[Node], start: int) -> None:
        """Build an object after those it is made of, without recursion: a value may be deep."""
        waiting = [number]
        begun = set()
        while waiting:
            current = waiting[-1]
            if self.table.objects[current] is not UNBUILT:
                waiting.pop()
                continue
            node = nodes[current - start]
            missing = [part[0] for part in node if type(part) is list and self._is_unbuilt(part)]
            if missing:
                if current in begun:
                    raise Malformed("a value that is made of itself")
                begun.add(current)
                waiting += missing
            else:
                self.table.objects[current] = self._immutable(node)
                waiting.pop()

    def _is_unbuilt(self, part: list[Any]) -> bool:
        return len(part) == 1 and type(part[0]) is int and self._at(part[0]) is UNBUILT

    def _at(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self.table.objects):
            raise Malformed("a number of no object")
        return self.table.objects[number]

    def ref(self, part: Any) -> Any:
        """The value that a part of a node stands for."""
        if type(part) is list and len(part) == 1:
            return self._at(part[0])
        if type(part) is list or type(part) is dict:
            raise Malformed("no reference")
        return part

    def refs(self, parts: Any) -> list[Any]:
        """The values of many parts."""
        kinds = set(map(type, parts))
        return [self.ref(part) for part in parts] if list in kinds or dict in kinds else list(parts)

    def _immutable(self, node: Node) -> Any:
        tag, *parts = node
        if tag in BUILDERS:
            return BUILDERS[tag](*self.refs(parts))
        if tag == "namedtuple":
            return self._namedtuple(_checked(parts[0], str), _checked(parts[1], list), self.refs(parts[2:]))
        if tag == "known":
            return self._known(*parts)
        if tag == "member":
            return self._known(parts[0])._member_map_[_checked(parts[1], str)]
        return self.accept(node, self)

    def _namedtuple(self, name: str, fields: list[Any], values: list[Any]) -> Any:
        if len(fields) > MAX_FIELDS or len(fields) != len(values):
            raise Malformed("fields of a named tuple")
        key = (name, *(_checked(field, str) for field in fields))
        if key not in self.kinds:
            if len(self.kinds) >= MAX_FIELDS or not all(IDENTIFIER.fullmatch(word) for word in key):
                raise Malformed("kinds of named tuples")
            known = self.known.get(name)
            same = isinstance(known, type) and issubclass(known, tuple) and getattr(known, "_fields", None) == key[1:]
            self.kinds[key] = known if same else collections.namedtuple(name, fields)  # checks the names once more
        return tuple.__new__(self.kinds[key], values)

    def fill(self, value: Any, node: Node) -> None:
        """Make an object what its node tells."""
        FILLERS[node[0]](value, node, self)

    def change(self, number: Any, node: Any) -> None:
        """Make an argument what it became in the call."""
        value = self._at(_checked(number, int))
        if not _checked(node, list) or type(node[0]) is not str or node[0] not in FILLERS:
            raise Malformed("a change of what does not change")
        is_same = type(value) is self.known.get(node[1]) if node[0] == "instance" else _tag_of(value) == node[0]
        if not is_same:
            raise Malformed("a change of another class")
        try:
            self.fill(value, node)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None


Filler = Callable[[Any, Node, Decoder], None]
Builder = Callable[..., Any]


def _tag_of(value: Any) -> str | None:
    for base in mro_of(type(value)):
        if base in MUTABLE:
            return MUTABLE[base]
    return None


def is_mutable(value: Any, known: dict[str, type]) -> bool:
    """Whether a call may change this argument in place."""
    return _tag_of(value) is not None or type(value) in known.values()


def _fill_dict(base: Any) -> Filler:
    def fill(value: Any, node: Node, decoder: Decoder) -> None:
        parts = decoder.refs(node[2 if base is collections.defaultdict else 1 :])
        if len(parts) % 2:
            raise Malformed("half a pair")
        base.clear(value)
        for key, part in zip(parts[::2], parts[1::2], strict=True):
            base.__setitem__(value, key, part)

    return fill


def _fill_list(value: Any, node: Node, decoder: Decoder) -> None:
    list.__setitem__(value, slice(None), decoder.refs(node[1:]))


def _fill_set(value: Any, node: Node, decoder: Decoder) -> None:
    set.clear(value)
    set.update(value, decoder.refs(node[1:]))


def _fill_deque(value: Any, node: Node, decoder: Decoder) -> None:
    collections.deque.clear(value)
    collections.deque.extend(value, decoder.refs(node[2:]))


def _fill_bytearray(value: Any, node: Node, decoder: Decoder) -> None:
    bytearray.__setitem__(value, slice(None), bytes.fromhex(*node[1:]))


def _fill_array(value: Any, node: Node, decoder: Decoder) -> None:
    _, typecode, digits = node
    if typecode != value.typecode:
        raise Malformed("an array of another type")
    del value[:]
    value.frombytes(bytes.fromhex(digits))


def _fill_instance(value: Any, node: Node, decoder: Decoder) -> None:
    names = node[2::2]
    parts = decoder.refs(node[3::2])
    if len(names) != len(parts) or not all(type(n) is str and IDENTIFIER.fullmatch(n) for n in names):
        raise Malformed("attributes of an instance")
    if any(name.startswith("__") and name.endswith("__") for name in names):
        raise Malformed("an attribute that is Python's")
    place = getattr(value, "__dict__", None)
    if place is not None:
        place.clear()
    slots = {slot for base in mro_of(type(value)) for slot in members_of(base).get("__slots__", ())}
    for name, part in zip(names, parts, strict=True):
        if name in slots:
            object.__setattr__(value, name, part)
        elif place is not None:
            place[name] = part
        else:
            raise Malformed("an attribute without a place")


def _texts(function: Callable[[str], Any]) -> Builder:
    """A builder of one text."""
    return lambda text: function(_checked(text, str))


def _integers(function: Callable[..., Any], count: int) -> Builder:
    """A builder of integers, of which there may be fewer than ``count``."""

    def build(*parts: Any) -> Any:
        if len(parts) > count:
            raise Malformed("too many parts")
        return function(*(_checked(part, int) for part in parts))

    return build


def _matching(pattern: re.Pattern[str], function: Callable[[str], Any]) -> Builder:
    def build(text: Any) -> Any:
        if not pattern.fullmatch(_checked(text, str)):
            raise Malformed("no number")
        return function(text)

    return build


def _build_complex(real: Any, imag: Any) -> complex:
    return complex(*(float(part) if type(part) is int else _checked(part, float) for part in (real, imag)))


def _build_slice(*parts: Any) -> slice:
    return slice(*parts)


def _build_view(tag: str) -> Builder:
    def build(*parts: Any) -> Any:
        if tag == "keys":
            return dict.fromkeys(parts).keys()
        if tag == "values":
            return dict(enumerate(parts)).values()
        return dict(zip(parts[::2], parts[1::2], strict=True)).items()

    return build


def _with_zone(kind: Any, count: int) -> Builder:
    def build(zone: Any, *parts: Any) -> Any:
        if zone is not None and type(zone) is not datetime.timezone:
            raise Malformed("no zone")
        *fields, fold = (_checked(part, int) for part in parts)
        if len(fields) != count:
            raise Malformed("parts of a time")
        return kind(*fields, tzinfo=zone, fold=fold)

    return build


def _build_timezone(offset: Any) -> datetime.timezone:
    return datetime.timezone(_checked(offset, datetime.timedelta))


SHELLS: dict[str, Callable[[], Any]] = {
    "list": list,
    "set": set,
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "bytearray": bytearray,
}
FILLERS: dict[str, Filler] = {
    "list": _fill_list,
    "set": _fill_set,
    "dict": _fill_dict(dict),
    "Counter": _fill_dict(dict),
    "OrderedDict": _fill_dict(collections.OrderedDict),
    "defaultdict": _fill_dict(collections.defaultdict),
    "deque": _fill_deque,
    "bytearray": _fill_bytearray,
    "array": _fill_array,
    "instance": _fill_instance,
}
HASHING = ("set", "dict", "Counter", "OrderedDict", "defaultdict")
MUTABLE: dict[type, str] = {
    list: "list",
    set: "set",
    collections.defaultdict: "defaultdict",
    collections.Counter: "Counter",
    collections.OrderedDict: "OrderedDict",
    dict: "dict",
    collections.deque: "deque",
    bytearray: "bytearray",
    array.array: "array",
}
BUILDERS: dict[str, Builder] = {
    "tuple": lambda *parts: parts,
    "frozenset": lambda *parts: frozenset(parts),
    "int": _matching(HEXADECIMAL, lambda text: int(text, 16)),
    "float": lambda text: float(ENDLESS[ENDLESS.index(text)]),
    "str": _texts(lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass")),
    "bytes": _texts(bytes.fromhex),
    "memoryview": _texts(lambda text: memoryview(bytes.fromhex(text))),
    "complex": _build_complex,
    "range": _integers(range, 3),
    "slice": _build_slice,
    "Decimal": _matching(DECIMAL, decimal.Decimal),
    "Fraction": _integers(fractions.Fraction, 2),
    "date": _integers(datetime.date, 3),
    "datetime": _with_zone(datetime.datetime, 7),
    "time": _with_zone(datetime.time, 4),
    "timedelta": _integers(lambda days, seconds, micro: datetime.timedelta(days, seconds, micro), 3),
    "timezone": _build_timezone,
    "type": _texts(TYPES.__getitem__),
    "singleton": _texts(SINGLETONS.__getitem__),
    "keys": _build_view("keys"),
    "values": _build_view("values"),
    "items": _build_view("items"),
}
