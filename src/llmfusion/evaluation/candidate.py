"""Runs INSIDE the sandbox, alone with untrusted code: execute a program, then answer calls of its entry point.

Requests and replies are single lines of tagged JSON. Nothing that comes out of here is trusted: the other side decodes plain
values and compares them itself, so a forged reply is worth no more than a wrong return value. Standard library only.
"""

import json
import os
import resource
import sys

MAX_REPLY = 1_000_000
MAX_DEPTH = 32


def encode(value, depth=0):
    """Tagged JSON of plain values; exact types only, so that no method of the value is ever called."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return {"i": int.__repr__(value)}
    if kind is float:
        return {"f": float.__repr__(value)}
    if kind is complex:
        return {"c": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if kind is bytes:
        return {"b": bytes.hex(value)}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [encode(v, depth + 1) for v in kind.__iter__(value)]}
    if kind is dict:
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]}
    raise ValueError(f"returned a {kind.__name__}, which is no plain value")


def decode(value, depth=0):
    """The plain value behind tagged JSON. Raises ValueError for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not tagged")
    ((tag, body),) = value.items()
    if tag in ("list", "tuple", "set", "frozenset"):
        kind = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[tag]
        return kind([decode(v, depth + 1) for v in body])  # type: ignore[operator]
    if tag == "dict":
        return {decode(k, depth + 1): decode(v, depth + 1) for k, v in body}
    if tag == "c":
        return complex(float(body[0]), float(body[1]))
    simple = {"i": int, "f": float, "b": bytes.fromhex}
    if tag not in simple or not isinstance(body, str):
        raise ValueError("unknown tag")
    return simple[tag](body)  # type: ignore[operator]


def main():
    """Read limits and program from the first line, then answer calls until the pipe closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    first = json.loads(requests.readline())
    for name, limit in first["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.setrecursionlimit(10_000)
    names = {"__name__": "__candidate__"}
    write, dumps = replies.write, json.dumps

    def reply(kind, value):
        line = dumps({kind: value}).encode()
        if len(line) > MAX_REPLY:
            line = b'{"error": "the reply is too long"}'
        write(line + b"\n")
        replies.flush()

    try:
        exec(compile(first["program"], "<candidate>", "exec"), names)
        function = names[first["entry_point"]]
        reply("ready", None)
    except BaseException as error:
        reply("error", f"{type(error).__name__} while loading")
        return
    for line in requests:
        arguments, keywords = (decode(part) for part in json.loads(line))
        try:
            reply("value", encode(function(*arguments, **keywords)))  # type: ignore[operator]
        except BaseException as error:
            reply("error", type(error).__name__)


if __name__ == "__main__":
    main()
