"""Runs INSIDE the sandbox: for every program a fork that confines itself, executes it and answers calls.

The process that forks never runs untrusted code, and there is nothing a program could leave for the next: no writable
place, no other process it may signal. A start of the interpreter for each program would take ten times as long as the
program.

Requests are single lines of Python literals from the trusted side, replies single lines of tagged JSON. Nothing that
comes out of here is trusted: the other side decodes plain values and compares them itself, so a forged reply is worth
no more than a wrong return value. Standard library only.
"""

import ctypes
import os
import resource
import signal
import socket
import sys

MAX_REPLY = 4_000_000
MAX_DEPTH = 32
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
LITERALS = {"inf": float("inf"), "nan": float("nan"), "set": set, "frozenset": frozenset}


class NoPlainValue(ValueError):
    """A value that tagged JSON cannot express."""


def encode(value, depth=0):
    """Tagged JSON text of a plain value.

    A subclass counts as its plain base, by the base's methods: its own are never called.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise NoPlainValue("nested too deeply")
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if issubclass(kind, str):
        return f'{{"str": "{str.encode(value, "utf-8", "surrogatepass").hex()}"}}'
    for number in (int, float):
        if issubclass(kind, number):
            return f'{{"{number.__name__}": "{number.__repr__(value)}"}}'
    if issubclass(kind, complex):
        real, imag = (float.__repr__(part.__get__(value)) for part in (complex.real, complex.imag))
        return f'{{"complex": ["{real}", "{imag}"]}}'
    if issubclass(kind, (bytes, bytearray)):
        return f'{{"bytes": "{bytes.hex(value) if issubclass(kind, bytes) else bytearray.hex(value)}"}}'
    for sequence in (list, tuple, set, frozenset):
        if issubclass(kind, sequence):
            items = [encode(v, depth + 1) for v in sequence.__iter__(value)]
            return f'{{"{sequence.__name__}": [{", ".join(items)}]}}'
    if issubclass(kind, dict):
        items = [f"[{encode(k, depth + 1)}, {encode(v, depth + 1)}]" for k, v in dict.items(value)]
        return f'{{"dict": [{", ".join(items)}]}}'
    raise NoPlainValue("no plain value")


def confine(limits, program):
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


def main():
    """Take one program after the other.

    Through the socket on stdin come two pipes, and a byte when the program is to end; a byte goes back when it has
    ended.
    """
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


def run(reading, writing):
    """Read limits, filter and program from the first line, then answer calls until the pipe closes."""
    requests = os.fdopen(reading, "rb")
    replies = os.fdopen(writing, "wb")
    first = eval(requests.readline(), LITERALS)
    null_device = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):  # 0 is the socket to the process that forks
        os.dup2(null_device, fd)
    os.close(null_device)
    confine(first["limits"], bytes.fromhex(first["filter"]))
    sys.setrecursionlimit(10_000)
    names = {"__name__": "__candidate__"}

    def reply(kind, text):
        if len(text) > MAX_REPLY:
            kind, text = "error", '"the reply is too long"'
        replies.write(f'{{"{kind}": {text}}}\n'.encode())
        replies.flush()

    reply("confined", "null")  # what fails before this is the sandbox's failure, what fails after is the program's
    try:
        exec(compile(first["program"], "<candidate>", "exec"), names)
        function = names[first["entry_point"]]
        reply("ready", "null")
    except BaseException as error:
        reply("error", f'"{type(error).__name__} while loading"')
        return
    for line in requests:
        arguments, keywords = eval(line, LITERALS)
        try:
            reply("value", encode(function(*arguments, **keywords)))  # type: ignore[operator]
        except BaseException as error:
            reply("error", f'"{type(error).__name__}"')


if __name__ == "__main__":
    main()
