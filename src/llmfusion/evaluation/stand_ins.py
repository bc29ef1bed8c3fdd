"""The test's side of the conversation: what stands for functions, iterators and objects of the program.

An object of a class of the program's own stays in the sandbox; here, what stands for it asks there for attributes and
methods. What the test expects is never shown to it: it is compared and calculated with other objects of the program
only, to everything else it is unequal, and it is no number.
"""

import collections.abc
import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, cast

from llmfusion.evaluation import peer, values

NAME = "__test__"  # of the module that prompt and test are
PLAIN = (str, bytes, bytearray, list, tuple, set, frozenset, dict, collections.deque, collections.Counter)
GETTERS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
MAX_CLASSES = 1_000


class ProgramClass(type):
    """What stands for a class of the program."""

    side: "TestSide"
    number: int

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        """Make an instance, there."""
        return cls.side.request(peer.CALL, cls.number, arguments, keywords)

    def __getattr__(cls, name: str) -> Any:
        """Ask for an attribute, there."""
        return type.__getattribute__(cls, "side").attribute(type.__getattribute__(cls, "number"), name)


class ProgramObject:
    """What stands for an instance of a class of the program."""

    __slots__ = ("_number", "_side")
    _number: int
    _side: "TestSide"

    def __getattr__(self, name: str) -> Any:
        """Ask for an attribute, there."""
        return object.__getattribute__(self, "_side").attribute(object.__getattribute__(self, "_number"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, there."""
        self._side.request(peer.SET, self._number, (name, value))


class TestSide(peer.Peer):
    """The test's end. It gives functions and iterators of the test, which the program may call and advance."""

    __test__ = False  # not for pytest

    def __init__(self, read: Callable[[], bytes], write: Callable[[bytes], None], known: dict[str, type]):
        super().__init__(read, write, known)
        self.classes: dict[int, ProgramClass] = {}

    def attribute(self, number: int, name: str) -> Any:
        """An attribute of an object of the program; those of Python's own protocols are not asked for by name."""
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self.request(peer.GET, number, (name,))

    def is_instance(self, instance: object, number: int) -> bool:
        """Whether an object is one of the program's class that has this number."""
        return isinstance(instance, ProgramObject) and self.classes.get(number) is type(instance)

    def offer(self, value: Any) -> Any:
        """Also functions of the library: the program has them too."""
        if id(value) not in self.origins and (place := _place_in_library(value)) is not None:
            return ["import", *place]
        return super().offer(value)

    def describe(self, value: Any) -> Any:
        """Functions and iterators of the test."""
        if _is_function(value):
            name = getattr(value, "__name__", "function")
            return ["function", self.give(value, "function"), name if isinstance(name, str) else "function"]
        if isinstance(value, collections.abc.Iterator):
            kind = "generator" if isinstance(value, types.GeneratorType) else "iterator"
            return [kind, self.give(value, kind)]
        raise values.NoPlainValue(f"a value of class {values.class_name(type(value))}, which it does not have")

    def perform(self, operation: Any, number: Any, arguments: Any, keywords: Any) -> Any:
        """Call a function or advance an iterator that was given; a program may do nothing else."""
        value, kind = self.given_at(number)
        if operation == peer.CALL and kind == "function":
            return value(*arguments, **keywords)
        if operation == peer.NEXT and kind in ("iterator", "generator"):
            return next(value)
        if operation == peer.SEND and kind == "generator":
            return value.send(*arguments)
        if operation == peer.CLOSE and kind == "generator":
            return value.close()
        raise values.Malformed("a request that a program must not make")

    def stand_in(self, kind: Any, number: Any, *about: Any) -> Any:
        """What stands for an object of the program, after a check of what it tells of it."""
        if kind == "function":
            (name,) = about
            return peer.driven_function(self, number, name if self._is_name(name) else "function")
        if kind == "generator":
            return peer.driven_generator(self, number, *about)
        if kind == "iterator":
            return peer.DrivenIterator(self, number, *about)
        if kind == "class":
            return self._class(number, *about)
        if kind != "object":
            raise values.Malformed("an unknown kind of handle")
        class_number, name, protocols = about
        out: Any = object.__new__(cast(type, self._class(class_number, name, protocols)))
        object.__setattr__(out, "_side", self)
        object.__setattr__(out, "_number", number)
        return out

    def _is_name(self, name: Any) -> bool:
        return isinstance(name, str) and values.IDENTIFIER.fullmatch(name) is not None

    def _class(self, number: Any, name: Any, protocols: Any) -> ProgramClass:
        if type(number) is not int or number < 0 or type(protocols) is not list or len(self.classes) >= MAX_CLASSES:
            raise values.Malformed("a class")
        if number not in self.classes:
            methods = {word: _method(word) for word in protocols if word in (*peer.ASKING, *peer.COMPARING)}
            bases = (ProgramObject,)
            body = {"__slots__": (), **methods, "side": self, "number": number}
            made = ProgramClass(name if self._is_name(name) else "Class", bases, body)
            self.classes[number] = made
            if number not in self.taken:
                self.keep(number, made)
        return self.classes[number]


def _method(name: str) -> Callable[..., Any]:
    """A method of one of Python's protocols, performed by the program."""

    def ask(self: ProgramObject, *arguments: Any, **keywords: Any) -> Any:
        if name == "__call__":
            return self._side.request(peer.CALL, self._number, arguments, keywords)
        return self._side.request(peer.SPECIAL, self._number, (name, *arguments))

    def compare(self: ProgramObject, other: Any) -> Any:
        return ask(self, other) if isinstance(other, ProgramObject) else NotImplemented

    return compare if name in peer.COMPARING else ask


def _is_function(value: Any) -> bool:
    """Whether this is something of the test that the program may call."""
    if isinstance(value, type):
        return False
    if isinstance(value, functools.partial):
        return _is_function(value.func) or _place_in_library(value.func) is not None
    if isinstance(value, types.MethodType):
        return value.__func__.__module__ == NAME
    if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
        return type(value.__self__) in PLAIN
    return isinstance(value, GETTERS) or (callable(value) and getattr(value, "__module__", None) == NAME)


def _place_in_library(value: Any) -> tuple[str, str] | None:
    """Module and name under which Python's library has a function or class; None for all others."""
    owner = getattr(value, "__objclass__", value) if isinstance(value, types.MethodDescriptorType) else value
    module = getattr(owner, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not callable(value) or not isinstance(module, str) or not isinstance(name, str):
        return None
    if module.partition(".")[0] not in sys.stdlib_module_names or module not in sys.modules:
        return None
    try:
        found = functools.reduce(getattr, name.split("."), sys.modules[module])
    except AttributeError:
        return None
    return (module, name) if found is value else None
