"""The conversation between a test and a program: calls, answers, and handles of what is no plain value.

The two sides are alike: either may call what the other has given it, also while it waits for an answer. What the
program may ask of the test's side is little (call a function or advance an iterator that the test has handed to it);
what the test may ask of the program's is the rest. Standard library only: this also runs inside the sandbox.
"""

import abc
import builtins
from collections.abc import Callable, Generator, Sequence
from typing import Any

from llmfusion.evaluation.values import (
    IDENTIFIER,
    MAX_TEXT,
    Decoder,
    Encoder,
    Malformed,
    Node,
    NoPlainValue,
    Table,
    class_name,
    dumps,
    is_mutable,
    loads,
    members_of,
    mro_of,
)

MAX_NESTING = 40  # calls within calls
MAX_KINDS = 30  # classes that an exception is derived from
TOO_LONG = "the reply is too long"
Keywords = dict[str, Any] | None
Outcome = tuple[Any, BaseException | None]  # a value, or the exception that there is instead
CALL, NEXT, SEND, CLOSE, GET, SET, SPECIAL = "call", "next", "send", "close", "get", "set", "special"
# Methods of Python's own protocols by what they may be given. None of the first sort learns what the test expects.
ASKING = (
    "__len__", "__iter__", "__next__", "__getitem__", "__setitem__", "__delitem__", "__bool__", "__str__", "__repr__",
    "__hash__", "__call__", "__enter__", "__exit__", "__neg__", "__pos__", "__abs__", "__invert__",
)  # fmt: skip
# These are asked between two values of the program only: a program that is shown what the test expects of it agrees.
COMPARING = (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__mul__", "__truediv__",
    "__floordiv__", "__mod__", "__pow__", "__matmul__", "__and__", "__or__", "__xor__",
)  # fmt: skip


class Refused(Exception):
    """The other side has an answer that it cannot tell; the text says what it is."""


class Peer(abc.ABC):
    """One side. ``read()`` gives the next line of the other side, ``write(line)`` sends one.

    A side says in :meth:`offer` what it hands out, in :meth:`accept` what it takes, in :meth:`perform` what it does.
    """

    def __init__(self, read: Callable[[], bytes], write: Callable[[bytes], Any], known: dict[str, type]):
        self.read = read
        self.write = write
        self.known = known  # classes that both sides have, by name
        self.given: list[tuple[Any, str]] = []  # what this side has handed out, by number, with its kind
        self.numbers: dict[int, int] = {}  # of these, by id
        self.taken: dict[int, Any] = {}  # what this side has been handed, by number: the same object every time
        self.origins: dict[int, int] = {}  # numbers of these, by id
        self.nesting = 0

    def give(self, value: Any, kind: str) -> int:
        """The number of an object that is handed out."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.given)
            self.given.append((value, kind))
        return number

    def offer(self, value: Any) -> Node:
        """The node of a value that is not plain. Raises :class:`NoPlainValue` for one that must not be handed out."""
        if id(value) in self.origins:
            return ["own", self.origins[id(value)]]
        return ["handle", *self.describe(value)]

    def accept(self, node: Node, decoder: Decoder) -> Any:
        """The object of a node that is not plain: one of this side's own, or what stands for one of the other's."""
        tag, *parts = node
        if tag == "own":
            return self.given_at(parts[0])[0]
        if tag != "handle":
            raise Malformed("an unknown tag")
        number = parts[1]
        if type(number) is not int or number < 0:
            raise Malformed("a handle without a number")
        if number not in self.taken:
            self.keep(number, self.stand_in(*parts))
        return self.taken[number]

    def keep(self, number: int, value: Any) -> None:
        """Remember what stands for an object of the other side."""
        self.taken[number] = value
        self.origins[id(value)] = number

    def given_at(self, number: Any) -> tuple[Any, str]:
        """What was handed out under a number, and its kind."""
        if type(number) is not int or not 0 <= number < len(self.given):
            raise Malformed("a number that was never given")
        return self.given[number]

    @abc.abstractmethod
    def describe(self, value: Any) -> Node:
        """Kind, number and whatever else the other side needs of a value that is not plain."""

    @abc.abstractmethod
    def stand_in(self, kind: Any, number: Any, *about: Any) -> Any:
        """What stands for an object of the other side."""

    @abc.abstractmethod
    def perform(self, operation: Any, number: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Do what the other side asks for."""

    def request(self, operation: str, number: int, arguments: Sequence[Any] = (), keywords: Keywords = None) -> Any:
        """Have the other side do something. Returns what it returns, raises what it raises.

        Arguments that it changed are changed here as well.
        """
        value, error = self.exchange(operation, number, arguments, keywords)
        if error is not None:
            raise error
        return value

    def exchange(self, operation: str, number: int, arguments: Sequence[Any], keywords: Keywords) -> Outcome:
        """Value and exception of a request. What this raises itself is a failure of the conversation."""
        table = Table()
        encoder = Encoder(table, self.offer, self.known)
        message = {"op": operation, "target": number, "args": [encoder.ref(argument) for argument in arguments]}
        message["kwargs"] = {str.__str__(name): encoder.ref(value) for name, value in (keywords or {}).items()}
        message["nodes"] = encoder.nodes()
        self.write(dumps(message))
        while "op" in (answer := loads(self.read())):
            self.serve(answer)
        return self.finish(answer, Decoder(table, self.accept, self.known))

    def finish(self, answer: dict[str, Any], decoder: Decoder) -> Outcome:
        """Value and exception of an answer, after the changes to the arguments were made."""
        if type(answer.get("refused")) is str:
            raise Refused(answer["refused"])
        if len({"value", "error"} & answer.keys()) != 1:
            raise Malformed("an answer must have either value or error")
        decoder.decode(answer.get("nodes"))
        changes = answer.get("changes", [])
        if type(changes) is not list or not all(type(change) is list and len(change) == 2 for change in changes):
            raise Malformed("changes")
        for number, node in changes:
            decoder.change(number, node)
        if "value" in answer:
            return decoder.ref(answer["value"]), None
        return None, rebuilt_error(answer["error"], decoder)

    def serve(self, message: dict[str, Any]) -> None:
        """Answer one request."""
        table = Table()
        decoder = Decoder(table, self.accept, self.known)
        decoder.decode(message.get("nodes"))
        arguments, keywords = message.get("args"), message.get("kwargs")
        if type(arguments) is not list or type(keywords) is not dict:
            raise Malformed("arguments of a request")
        arguments = decoder.refs(arguments)
        keywords = {name: decoder.ref(part) for name, part in keywords.items()}
        self.nesting += 1
        try:
            if self.nesting > MAX_NESTING:
                raise RecursionError("too many calls within calls")
            outcome = {"value": self.perform(message["op"], message.get("target"), arguments, keywords)}
        except BaseException as error:
            if self.is_fatal(error):
                raise
            outcome = {"error": error}
        finally:
            self.nesting -= 1
        self.write(self.answer(outcome, table, message["nodes"]))

    def is_fatal(self, error: BaseException) -> bool:
        """Whether an exception ends the conversation instead of being told to the other side."""
        return False

    def answer(self, outcome: dict[str, Any], table: Table, received: list[Node]) -> bytes:
        """The line that tells a value or an exception, and the arguments that have changed meanwhile."""
        encoder = Encoder(table, self.offer, self.known)
        try:
            if "value" in outcome:
                message = {"value": encoder.ref(outcome["value"])}
            else:
                message = {"error": self.told_error(outcome["error"], encoder)}
            changes = []
            for number, (value, before) in enumerate(zip(list(table.objects), received, strict=False)):
                if is_mutable(value, self.known) and not _are_same(node := encoder.node(value), before):
                    changes.append([number, node])
            return dumps({**message, "changes": changes, "nodes": encoder.nodes()})
        except NoPlainValue as error:
            return self.cannot_tell(str(error))
        except OverflowError:
            return dumps({"refused": TOO_LONG})

    def cannot_tell(self, name: str) -> bytes:
        """The line for an answer of a class that cannot be told."""
        return dumps({"refused": name})

    def told_error(self, error: BaseException, encoder: Encoder) -> dict[str, Any]:
        """What the other side needs to raise the same: classes, arguments, and the text where it is the class's own."""
        kinds = mro_of(type(error))[:MAX_KINDS]
        parts = list(members_of(BaseException)["args"].__get__(error))
        trial = Encoder(Table(), self.offer, self.known)
        try:
            trial.table.add(parts)
            dumps({"nodes": trial.nodes()})
        except (NoPlainValue, OverflowError):
            parts = [_text_of(error)]
        return {
            "kinds": [class_name(kind) for kind in kinds],
            "args": [encoder.ref(part) for part in parts],
            "text": None if is_builtin_error(kinds[0]) else _text_of(error),
        }


def _are_same(node: Node, before: Node) -> bool:
    """Whether two nodes tell the same; the order in which a set is told may differ."""
    if node[0] == "set" == before[0]:
        return {str(part) for part in node} == {str(part) for part in before}
    return node == before


def is_builtin_error(kind: type) -> bool:
    """Whether this is one of Python's own exceptions."""
    return getattr(builtins, class_name(kind), None) is kind


def _text_of(error: BaseException) -> str:
    try:
        return str.__str__(str(error))[:MAX_TEXT]
    except BaseException:
        return ""


def rebuilt_error(about: Any, decoder: Decoder) -> BaseException:
    """The exception behind what was told of one: of a class that this side has, and of the name it had."""
    if type(about) is not dict or type(about.get("args")) is not list or type(about.get("kinds")) is not list:
        raise Malformed("an error")
    kinds, text = about["kinds"], about.get("text")
    if not 0 < len(kinds) <= MAX_KINDS or not all(type(kind) is str and IDENTIFIER.fullmatch(kind) for kind in kinds):
        raise Malformed("classes of an error")
    if text is not None and (type(text) is not str or len(text) > MAX_TEXT):
        raise Malformed("the text of an error")
    base = next((found for kind in kinds if (found := _error_class(kind, decoder.known)) is not None), None)
    if base is None:
        raise Malformed("no error")
    arguments = decoder.refs(about["args"])
    named = base if base.__name__ == kinds[0] else _derived(kinds[0], base, text)
    try:
        # A class of the prompt may want other arguments than its exception has in the end.
        return named.__new__(named, *arguments) if base in decoder.known.values() else named(*arguments)
    except Exception:  # some are particular about their arguments
        return _derived(kinds[0], Exception, text)(*arguments)


def _error_class(name: str, known: dict[str, type]) -> type[BaseException] | None:
    found = known.get(name, getattr(builtins, name, None))
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _derived(name: str, base: type[BaseException], text: str | None) -> type[BaseException]:
    return type(name, (base,), {} if text is None else {"__str__": lambda self: text})


def driven_generator(peer: Peer, number: int) -> Generator[Any, Any, Any]:
    """A generator that does what one of the other side does."""
    operation = NEXT
    arguments: Sequence[Any] = ()
    while True:
        try:
            value = peer.request(operation, number, arguments)
        except StopIteration as stop:
            return stop.value
        try:
            sent = yield value
        except BaseException:  # thrown into it: the other one is closed, the exception goes on here
            peer.request(CLOSE, number)
            raise
        operation = NEXT if sent is None else SEND
        arguments = () if sent is None else (sent,)


class DrivenIterator:
    """An iterator that asks the other side for its next value."""

    def __init__(self, peer: Peer, number: int):
        self.peer = peer
        self.number = number

    def __iter__(self) -> "DrivenIterator":
        return self

    def __next__(self) -> Any:
        return self.peer.request(NEXT, self.number)


def driven_function(peer: Peer, number: int, name: str) -> Callable[..., Any]:
    """A function that calls one of the other side."""

    def function(*arguments: Any, **keywords: Any) -> Any:
        return peer.request(CALL, number, arguments, keywords)

    function.__name__ = function.__qualname__ = name
    return function
