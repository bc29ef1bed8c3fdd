"""One test against one untrusted program, in a trusted process that the kernel ends at the time limit.

``python -m llmfusion.evaluation.judge`` reads requests (JSON lines) and writes verdicts. The test runs here, never in
the sandbox, and calls the candidate through a pipe, so the candidate can neither read nor patch it. The test is
trusted, yet a value it is handed may keep it busy for ever or fill its memory: hence the alarm and the memory limit.
"""

import builtins
import contextlib
import json
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from llmfusion.evaluation import candidate

START_SECONDS = 60.0  # for the sandbox to come up on a busy machine; no untrusted code runs in that time
GRACE_SECONDS = 0.5  # between the candidate's time limit and the end of a test that is busy with itself
TEST_MEMORY = 4 << 30
TOO_LONG = "the reply is too long"
REPORTED = re.compile(rf"\w{{1,60}}( while loading)?|{TOO_LONG}")  # errors that candidate.py reports; others are forged

SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
SIMPLE: dict[str, Callable[[str], Any]] = {
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "int": int,
    "float": float,
    "bytes": bytes.fromhex,
}

# Builtin exceptions that a test may catch; not those that Python itself catches: StopIteration, IndexError, ...
EXPECTED = (ValueError, TypeError, ArithmeticError, NotImplementedError)


class Failed(Exception):
    """The candidate did not do what was asked; the text is the reason of the verdict."""


class Raised(Failed):
    """The candidate raised an exception, as a program may: a test may expect that and go on."""


def _raised(name: str) -> Raised:
    """The candidate's exception, which is also the builtin one of that name where a test may well expect it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, EXPECTED):
        with contextlib.suppress(TypeError):  # some want other arguments
            return type(name, (Raised, kind), {})(name)
    return Raised(name)


class Unusable(Exception):
    """The sandbox did not come up, or the test is broken: nothing is known about the candidate."""


def decode(value: Any, depth: int = 0) -> Any:
    """The plain value behind tagged JSON (see :func:`candidate.encode`). Raises ValueError for anything else."""
    if depth > candidate.MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not tagged")
    ((tag, body),) = value.items()
    if tag in SEQUENCES and isinstance(body, list):
        return SEQUENCES[tag](decode(v, depth + 1) for v in body)
    if tag in SIMPLE and isinstance(body, str):
        return SIMPLE[tag](body)
    if tag == "dict":
        return {decode(k, depth + 1): decode(v, depth + 1) for k, v in body}
    if tag == "complex":
        return complex(float(body[0]), float(body[1]))
    raise ValueError("unknown tag")


class Sandbox:
    """The process in bubblewrap that forks for every program, one at a time."""

    def __init__(self, command: list[str]):
        self.control, child_end = socket.socketpair()
        self.process = subprocess.Popen(
            command,
            stdin=child_end.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        child_end.close()

    def start(self) -> tuple[int, int]:
        """Have it fork for a program. Returns our ends of the pipes: one to write requests, one to read replies."""
        read_requests, write_requests = os.pipe()
        read_replies, write_replies = os.pipe()
        try:
            socket.send_fds(self.control, [b"p"], [read_requests, write_replies])
        except OSError:
            pass  # the sandbox is dead: whoever reads the replies will see their end
        finally:
            os.close(read_requests)
            os.close(write_replies)
        return write_requests, read_replies

    def end(self) -> bool:
        """End the program and whatever it is busy with. Returns whether the sandbox can take another one."""
        self.control.settimeout(START_SECONDS)
        try:
            self.control.send(b"e")
            return self.control.recv(1) == b"e"
        except OSError:
            return False

    def close(self) -> None:
        """End it and everything in it."""
        self.process.kill()
        self.process.communicate()
        self.control.close()

    def last_error_line(self) -> str | None:
        """The last line of what it wrote to stderr, if anything."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        lines = (self.process.stderr.read(4096) or b"").decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else None


class Candidate:
    """A program in its sandbox; calling it calls its entry point. The time limit is for everything together.

    ``request`` has ``limits``, ``filter``, ``program``, ``entry_point`` and ``timeout`` in seconds.
    """

    def __init__(self, request: dict[str, Any], sandbox: Sandbox, pipes: tuple[int, int]):
        self.lost: Failed | None = None  # why there can be no more answers; a test that swallows it has proved nothing
        self.deadline = time.monotonic() + START_SECONDS
        self.requests, self.replies = pipes
        self.pending = b""  # bytes of a reply that is not complete
        for pipe in pipes:
            os.set_blocking(pipe, False)
        try:
            self._send({key: request[key] for key in ("limits", "filter", "program", "entry_point")})
            self._receive("confined")
        except Failed as error:
            raise Unusable(f"the sandbox did not start ({sandbox.last_error_line() or error})") from None
        self.deadline = time.monotonic() + request["timeout"]
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # from now on it ends the process, whatever the test is busy with
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + GRACE_SECONDS)
        self._receive("ready")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.lost:
            raise self.lost
        try:
            call = decode(json.loads(candidate.encode([list(arguments), keywords])))  # by value, without subclasses
        except candidate.NoPlainValue:
            raise Unusable("its test gives the program an argument that is no plain value") from None
        try:
            self._send(call)
            return decode(self._receive("value"))
        except Raised:
            raise
        except Failed as error:
            self.lost = error
            raise

    def _send(self, message: Any) -> None:
        """Write one request; a program that never reads it cannot hold us beyond the deadline."""
        unsent = memoryview(repr(message).encode("utf-8", "surrogatepass") + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self.requests, selectors.EVENT_WRITE)
            while unsent:
                wait = self.deadline - time.monotonic()
                if wait <= 0 or not selector.select(wait):
                    raise Failed("time limit")
                try:
                    unsent = unsent[os.write(self.requests, unsent) :]
                except OSError:
                    raise Failed("the program ended") from None

    def _receive(self, kind: str) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                wait = self.deadline - time.monotonic()
                if wait <= 0 or not selector.select(wait):
                    raise Failed("time limit")
                chunk = os.read(self.replies, 65536)
                if not chunk:
                    raise Failed("the program ended")
                self.pending += chunk
                if len(self.pending) > 2 * candidate.MAX_REPLY:
                    raise Failed("the reply is too long")
        line, self.pending = self.pending.split(b"\n", 1)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Failed("no proper reply") from None
        if not isinstance(message, dict) or kind not in message:
            error = message.get("error") if isinstance(message, dict) else None
            if not isinstance(error, str) or not REPORTED.fullmatch(error) or error == "passed":
                raise Failed("no proper reply")
            raise Failed(error) if error == TOO_LONG else _raised(error)
        return message[kind]


def verdict(task: dict[str, Any], request: dict[str, Any], sandbox: Sandbox, pipes: tuple[int, int]) -> dict[str, Any]:
    """Test one ``{task_id, prompt, completion, test, entry_point}``: ``{task_id, passed, reason}``.

    Raises :class:`Unusable`.
    """
    names = _trusted(task)
    passed = False
    reason = "passed"
    try:
        tested = Candidate(
            {**request, "program": task["prompt"] + task["completion"], "entry_point": task["entry_point"]},
            sandbox,
            pipes,
        )
        try:
            names[task["entry_point"]] = tested
            names["check"](tested)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if tested.lost:
                raise tested.lost
            passed = True
        finally:
            _limit_memory(2 * TEST_MEMORY)  # a full memory must not keep us from the verdict
    except AssertionError:
        reason = "wrong answer"
    except Failed as error:
        reason = str(error.args[0])  # not str(error): a KeyError quotes
    except Unusable:
        raise
    except Exception as error:  # whatever a test does with an unexpected value
        reason = f"the test could not use the answer: {type(error).__name__}"
    return {"task_id": task["task_id"], "passed": passed, "reason": reason}


def _trusted(task: dict[str, Any]) -> dict[str, Any]:
    """What prompt and test define. Both are the data set's, not the model's; some tests use helpers of the prompt."""
    names: dict[str, Any] = {}
    try:
        exec(_helpers(task["prompt"]), names)
        exec(compile(task["test"], "<test>", "exec"), names)
    except Exception as error:
        raise Unusable(f"its prompt or its test is no proper program ({type(error).__name__}: {error})") from None
    if not callable(names.get("check")):
        raise Unusable("its test defines no function check(candidate)")
    return names


def _helpers(prompt: str) -> CodeType:
    """What the prompt defines by itself. It may end in an open function without a docstring: that gets a body."""
    try:
        return compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return compile(f"{prompt.rstrip()}\n    pass\n", "<prompt>", "exec")


def serve() -> None:
    """Answer requests, one a line, each in a fork of this fresh process.

    An answer is a verdict, ``{"unusable": why}`` or ``{"signal": number}``.
    """
    sandbox: Sandbox | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        sandbox = sandbox or Sandbox(request["command"])
        pipes = sandbox.start()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _answer(request, sandbox, pipes, writing)
        for pipe in (writing, *pipes):
            os.close(pipe)
        with open(reading, "rb") as file:
            answer = file.readline()  # not to the end: a test's own child may keep the pipe open
        status = os.waitpid(child, 0)[1]
        if not sandbox.end():
            sandbox.close()
            sandbox = None
        if not answer.endswith(b"\n"):
            answer = json.dumps(_how_it_ended(status)).encode() + b"\n"
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _how_it_ended(status: int) -> dict[str, Any]:
    """For a fork that gave no answer."""
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return {"unusable": f"it ended with status {status}"}


def _answer(request: dict[str, Any], sandbox: Sandbox, pipes: tuple[int, int], writing: int) -> None:
    """The forked process: one verdict, within the time and memory limits; what the test prints goes nowhere.

    Never returns.
    """
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(int(START_SECONDS) + 5)
    _limit_memory(TEST_MEMORY)
    null_device = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null_device, fd)
    try:
        answer = verdict(request.pop("task"), request, sandbox, pipes)
    except Unusable as error:
        answer = {"unusable": str(error)}
    except BaseException as error:  # SystemExit of a test, say
        answer = {"unusable": f"its test ended with {type(error).__name__}"}
    os.write(writing, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _too_late(*_: object) -> None:
    raise Unusable(
        f"the sandbox was not up after {START_SECONDS:.0f} s, or its test is busy before it calls the program"
    )


def _limit_memory(memory: int) -> None:
    """Limit this process's memory, and leave the hard limit, if there is one, as it is."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))


if __name__ == "__main__":
    serve()
