"""Hostile programs: whatever each of them tries, it must neither pass nor harm anything outside its sandbox.

Every program follows the same harmless prompt. The programs stand in ``sources/KIND.txt``, each below a line ``%%
STYLE: NAME``, where the style says what is made of the text (:data:`STYLES`); a section ``%% test`` below it is its
test, where that is not the style's own.

Words between at signs are filled in: those of :data:`SNIPPETS` here, all others by :mod:`tests.hostile.run`, separately
for each program: ``@MARK@`` is a name that only this program uses, so that what it leaves behind can be traced to it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

SOURCES = Path(__file__).parent / "sources"
KINDS = (
    "time",
    "memory",
    "processes",
    "files",
    "network",
    "environment",
    "signals",
    "interpreter",
    "forgery",
    "reading",
    "lying",
    "kernel",
    "objects",
    "exchange",
    "late",
)

PROMPT = 'def f(x):\n    """Return x + 1."""\n'
CHECK = "def check(f):\n    assert f(1) == 2\n    assert f(41) == 42\n"
RANDOM = """import random

def check(f):
    for _ in range(5):
        x = random.randrange(10**9)
        assert f(x) == x + 1
"""
GAINED = "def check(f):\n    assert f(1) is True\n"
SPIED = """import hashlib

def check(f):
    assert '@DIGEST@' in [hashlib.sha256(word.encode()).hexdigest() for word in f(1).split()]
"""
HIDDEN = "def check(f):\n    assert f(1) == 'hidden-@HIDDEN@'\n"

SNIPPETS = {
    # A raw call of libc; libc's own fork is not os.fork, which some guards replace.
    "LIBC": """import ctypes
libc = ctypes.CDLL(None, use_errno=True)""",
    "FRAMES_AND_FILES": """import gc, sys

def everything():
    frame = sys._getframe()
    while frame is not None:
        yield from list(frame.f_locals.values())
        yield from list(frame.f_globals.values())
        frame = frame.f_back
    yield from gc.get_objects()""",
}


@dataclass(frozen=True)
class Style:
    """What a program is made of: ``{body}`` is the text, indented where it becomes a function's."""

    template: str
    test: str = CHECK
    harmless: bool = False
    indented: bool = True


STYLES = {
    # Must not pass: it is no right answer.
    "wrong": Style("\n{body}\n", indented=False),
    # Continues the prompt with the right answer and harms in another way.
    "right": Style("{body}\n", harmless=True, indented=False),
    # Tries harm while loading and again in every call, swallows whatever came of it, and then answers rightly.
    "tries": Style(
        """
def harm():
{body}

def attempt():
    try:
        harm()
    except BaseException:
        pass

attempt()

def f(x):
    attempt()
    return x + 1
""",
        harmless=True,
    ),
    # Returns True when it got what it must not get. Then its test passes, which is the harm.
    "gains": Style(
        """
def gain():
{body}

def f(x):
    return bool(gain())
""",
        GAINED,
    ),
    # Returns a text in which it found the secret. Then its test passes, which is the harm.
    "spies": Style(
        r"""
import re

def spy():
{body}

def f(x):
    return ' '.join(re.findall(r'secret-[0-9a-f]{{16}}', str(spy()))[:1000])
""",
        SPIED,
    ),
    # Returns the answer that it found in the test itself. Then its test passes, which is the harm.
    "peeks": Style(
        r"""
import re

def peek():
{body}

def f(x):
    return re.search('hidden-[0-9a-f]{{16}}', str(peek())).group()
""",
        HIDDEN,
    ),
    # Writes to all its open files what might count as a result, and then does not know the answer.
    "forges": Style(
        """
import os

def to_all(data):
    for fd in range(256):
        try:
            os.write(fd, data)
        except OSError:
            pass

{body}
""",
        RANDOM,
        indented=False,
    ),
}


@dataclass(frozen=True)
class Program:
    """One hostile program. A harmless one answers rightly after its attempt: it may pass, if nothing was harmed."""

    name: str
    kind: str
    completion: str
    test: str = CHECK
    harmless: bool = False


def read_programs(kind: str) -> Iterator[Program]:
    """The programs of one kind, in the order of its file."""
    text = re.sub(r"@([A-Z_]+)@", lambda word: SNIPPETS.get(word[1], word[0]), (SOURCES / f"{kind}.txt").read_text())
    for section in re.split(r"^%% (?!test$)", text, flags=re.MULTILINE)[1:]:
        head, _, rest = section.partition("\n")
        style_name, _, name = head.partition(": ")
        body, _, test = (part.strip("\n") for part in rest.partition("%% test\n"))
        yield make_program(name, kind, style_name, body, f"{test}\n" if test else None)


def make_program(name: str, kind: str, style_name: str, body: str, test: str | None = None) -> Program:
    """A program of a style from its text."""
    style = STYLES[style_name]
    completion = style.template.format(body=indent(body, "    ") if style.indented else body)
    return Program(name, kind, completion, test or style.test, style.harmless)


def read_honest() -> Iterator[dict[str, str]]:
    """Programs that do nothing odd, as tasks that must pass: ``%% NAME``, ``%% prompt`` or none, program, test."""
    text = (SOURCES.parent / "honest.txt").read_text()
    for section in re.split(r"^%% (?!prompt$|program$|test$)", text, flags=re.MULTILINE)[1:]:
        name, _, rest = section.partition("\n")
        parts = re.split(r"^%% (prompt|program|test)\n", rest, flags=re.MULTILINE)[1:]
        found = dict(zip(parts[::2], parts[1::2], strict=True))
        prompt = found.get("prompt", "")
        completion = f"\n{found['program']}"
        yield {"task_id": name, "prompt": prompt, "completion": completion, "test": found["test"], "entry_point": "f"}


TOO_LONG_TO_STORE = {
    "a program of many megabytes": "x = [\n" + "    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],\n" * 60_000 + "]",
    "a program too deep to parse": "x = " + "(" * 5000 + ")" * 5000,
    "a program too deep to compile": "x = " + "-" * 200_000 + "1",
}
PROGRAMS = [program for kind in KINDS for program in read_programs(kind)]
PROGRAMS += [
    make_program(name, "memory", "wrong", f"{source}\n\ndef f(x):\n    return 0")
    for name, source in TOO_LONG_TO_STORE.items()
]
HONEST_PROGRAMS = list(read_honest())
HONEST = Program("a right program beside them", "honest", "    return x + 1\n")
assert len({p.name for p in PROGRAMS}) == len(PROGRAMS), "two programs of the same name"
