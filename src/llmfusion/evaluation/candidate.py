"""Runs INSIDE the sandbox: for every program a fork that confines itself, executes it and answers calls.

The process that forks never runs untrusted code, and there is nothing a program could leave for the next: no writable
place, no other process it may signal. A start of the interpreter for each program would take ten times as long as the
program.

Requests and answers are single lines of JSON, see :mod:`llmfusion.evaluation.peer`. Nothing that comes out of here is
trusted: the other side builds plain values and compares them itself, so a forged answer is worth no more than a wrong
return value. Standard library only.
"""

import ctypes
import functools
import importlib
import json
import operator
import os
import re
import resource
import signal
import socket
import sys
import types
from collections.abc import Sequence
from typing import Any

from llmfusion.evaluation import peer, values

NAME = "__candidate__"  # of the module that the program is
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    functools.partial,
    type(functools.lru_cache(print)),
    operator.itemgetter,
    operator.attrgetter,
    operator.methodcaller,
)
# Classes of the library whose instances may be given by handle, as instances of the program's own classes are. Not
# others: some, as those of unittest.mock, are made to please every test.
OBJECTS = (re.Match, re.Pattern, types.SimpleNamespace)


class ProgramSide(peer.Peer):
    """The program's end of the conversation. It gives whatever the program returns, and does what the test asks for."""

    def describe(self, value: Any) -> values.Node:
        """Functions, iterators, the program's own classes and their instances."""
        kind = type(value)
        if isinstance(value, type):
            if not _is_own(value):
                raise values.NoPlainValue(f"the class {values.class_name(value)}")
            return ["class", self.give(value, "class"), values.class_name(value), _protocols(value)]
        if kind is types.GeneratorType:
            return ["generator", self.give(value, "generator")]
        if kind in FUNCTIONS:
            name = getattr(value, "__name__", None)
            return ["function", self.give(value, "function"), name if type(name) is str else "function"]
        if _is_own(kind) or kind in OBJECTS:
            about = [self.give(kind, "class"), values.class_name(kind), _protocols(kind)]
            return ["object", self.give(value, "object"), *about]
        if any("__next__" in values.members_of(base) for base in values.mro_of(kind)):
            return ["iterator", self.give(value, "iterator")]
        raise values.NoPlainValue(values.class_name(kind))

    def stand_in(self, kind: Any, number: Any, *about: Any) -> Any:
        """The test's functions and iterators."""
        if kind == "function":
            return peer.driven_function(self, number, *about)
        return peer.driven_generator(self, number) if kind == "generator" else peer.DrivenIterator(self, number)

    def accept(self, node: values.Node, decoder: values.Decoder) -> Any:
        """Also functions of the library, which are imported here."""
        if node[0] != "import":
            return super().accept(node, decoder)
        return functools.reduce(getattr, node[2].split("."), importlib.import_module(node[1]))

    def request(
        self, operation: str, number: int, arguments: Sequence[Any] = (), keywords: peer.Keywords = None
    ) -> Any:
        """Ask the test's side; what cannot be told is the program's mistake."""
        try:
            return super().request(operation, number, arguments, keywords)
        except (values.NoPlainValue, peer.Refused) as error:
            raise TypeError(f"a value of this class cannot be handed over: {error}") from None

    def perform(self, operation: Any, number: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """One of the operations on what was given."""
        value = self.given[number][0]
        if operation == peer.CALL:
            return value(*arguments, **keywords)
        if operation == peer.NEXT:
            return next(value)
        if operation in (peer.SEND, peer.CLOSE):
            return getattr(value, operation)(*arguments)
        if operation == peer.GET:
            return getattr(value, *arguments)
        if operation == peer.SET:
            return setattr(value, *arguments)
        name, *arguments = arguments
        return getattr(type(value), name)(value, *arguments)


def _is_own(kind: type) -> bool:
    return values.members_of(kind).get("__module__") == NAME


def _protocols(kind: type) -> list[str]:
    """The methods of Python's protocols that a class or one of its bases defines."""
    bases = [values.members_of(base) for base in values.mro_of(kind)[:-1]]  # the last is object
    return [name for name in (*peer.ASKING, *peer.COMPARING) if any(base.get(name) is not None for base in bases)]


def confine(limits: dict[str, int], program: bytes) -> None:
    """Give up for good what untrusted code must not have: resources, then system calls.

    Raises OSError if it cannot be done.
    """
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    loaded = Filter(len(program) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    for words in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(loaded), zero, zero),
    ):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """Take one program after the other.

    Through the socket on stdin come two pipes, and a byte when the program is to end; a byte goes back when it has
    ended.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "llmfusion"]:
        del sys.modules[name]  # programs find the library and nothing else
    control = socket.socket(fileno=0)
    while True:
        _, pipes, _, _ = socket.recv_fds(control, 1, 2)
        if not pipes:
            return
        child = os.fork()
        if child == 0:
            try:
                run(*pipes)
            finally:
                os._exit(0)
        for pipe in pipes:
            os.close(pipe)
        if not control.recv(1):
            return  # and with this process, the first of its namespace, ends every other one
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        control.send(b"e")


def run(reading: int, writing: int) -> None:
    """Read limits, filter and program from the first line, then answer requests until the pipe closes."""
    requests = os.fdopen(reading, "rb")
    replies = os.fdopen(writing, "wb")

    def write(line: bytes) -> None:
        replies.write(line)
        replies.flush()

    first = json.loads(requests.readline())
    null_device = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):  # 0 is the socket to the process that forks
        os.dup2(null_device, fd)
    os.close(null_device)
    confine(first["limits"], bytes.fromhex(first["filter"]))
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)  # quadratic time is the program's own
    write(
        values.dumps({"confined": True})
    )  # what fails before is the sandbox's failure, what fails after the program's
    known: dict[str, type] = {}
    side = ProgramSide(requests.readline, write, known)
    try:
        module = load(first["program"])
        names = module.__dict__
        side.give(names[first["entry_point"]], "function")  # number 0
        side.give(module, "object")  # number 1
        known.update((name, names[name]) for name in first["classes"] if isinstance(names.get(name), type))
        write(values.dumps({"ready": True}))
    except BaseException as error:
        write(values.dumps({"failed": values.class_name(type(error))}))
        return
    while line := requests.readline():
        try:
            side.serve(values.loads(line))
        except MemoryError:
            write(values.dumps({"error": {"kinds": ["MemoryError"], "args": []}, "nodes": []}))


def load(program: str) -> types.ModuleType:
    """Execute a program as a module."""
    module = sys.modules[NAME] = types.ModuleType(NAME)
    exec(compile(program, "<candidate>", "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    main()
