"""One test against one untrusted program, in a trusted process that the kernel ends at the time limit.

``python -m llmfusion.evaluation.judge`` reads requests (JSON lines) and writes verdicts. The test runs here, never in
the sandbox, and calls the candidate through a pipe, so the candidate can neither read nor patch it. The test is
trusted, yet a value it is handed may keep it busy for ever or fill its memory: hence the alarm and the memory limit.
"""

import ast
import builtins
import contextlib
import enum
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from types import CodeType
from typing import Any, NoReturn

from llmfusion.evaluation import peer, swallowed, values
from llmfusion.evaluation.stand_ins import NAME, TestSide

START_SECONDS = 60.0  # for the sandbox to come up on a busy machine; no untrusted code runs in that time
GRACE_SECONDS = 0.5  # between the candidate's time limit and the end of a test that is busy with itself
TEST_MEMORY = 4 << 30
MAX_DETAIL = 200  # characters
ENTRY_POINT, PROGRAM = 0, 1  # the numbers of the handles under which the program gives its entry point and itself
# Exceptions by which Python itself ends a loop or takes a default: such an end must not be taken for a test's success.
PYTHONS_OWN = (StopIteration, StopAsyncIteration, LookupError, AttributeError, GeneratorExit)
PASSED = "passed"
NOT_SUPPORTED = "test not supported: "  # what the reasons of these verdicts begin with


class Failed(Exception):
    """The candidate did not do what was asked; the text is the reason of the verdict."""


class Unusable(Exception):
    """The sandbox did not come up: nothing is known about the candidate."""


class NotSupported(Exception):
    """The test is broken, or does what no test can do here: nothing is known about the candidate."""


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


class Pipes:
    """Lines to and from a program, until a deadline. Raises :class:`Failed` where there will be no more."""

    def __init__(self, ends: tuple[int, int]):
        self.requests, self.replies = ends
        self.deadline = time.monotonic() + START_SECONDS
        self.pending = bytearray()  # of replies that are not complete
        self.polls = {}
        for end, event in zip(ends, (select.POLLOUT, select.POLLIN), strict=True):
            os.set_blocking(end, False)
            self.polls[end] = select.poll()
            self.polls[end].register(end, event)

    def write(self, line: bytes) -> None:
        """Send one line; a program that never reads it cannot hold us beyond the deadline."""
        unsent = memoryview(line)
        while unsent:
            self._wait(self.requests)
            try:
                unsent = unsent[os.write(self.requests, unsent) :]
            except OSError:
                raise Failed("the program ended") from None

    def read(self) -> bytes:
        """The next line."""
        searched = 0
        while (end := self.pending.find(b"\n", searched)) < 0:
            searched = len(self.pending)
            if searched > values.MAX_MESSAGE:
                raise Failed(peer.TOO_LONG)
            self._wait(self.replies)
            chunk = os.read(self.replies, 1 << 16)
            if not chunk:
                raise Failed("the program ended")
            self.pending += chunk
        line = bytes(self.pending[:end])
        del self.pending[: end + 1]
        return line

    def _wait(self, end: int) -> None:
        wait = self.deadline - time.monotonic()
        if wait <= 0 or not self.polls[end].poll(wait * 1000):
            raise Failed("time limit")


class Conversation(TestSide):
    """The test's side, which notes what went wrong: a test that swallows it has proved nothing."""

    def __init__(self, pipes: Pipes, known: dict[str, type]):
        super().__init__(pipes.read, pipes.write, known)
        self.pipes = pipes
        self.lost: Exception | None = None  # why there can be no more answers, or no verdict
        # By the program, as a program may, and in answer to what: a test may expect it and go on.
        self.raised: list[tuple[BaseException, str]] = []

    def exchange(self, operation: str, number: int, arguments: Any, keywords: Any) -> Any:
        """As every peer does; a failure of the conversation is its end."""
        if self.lost:
            raise self.lost
        try:
            value, error = super().exchange(operation, number, arguments, keywords)
        except (values.Malformed, RecursionError) as why:
            self._lose(Failed("no proper reply"), str(why))
        except values.NoPlainValue as why:
            self._lose(NotSupported(f"it gives the program {why}"))
        except peer.Refused as why:
            self._lose(Failed(peer.TOO_LONG if str(why) == peer.TOO_LONG else "no plain value"), str(why))
        except OverflowError:
            self._lose(NotSupported("it gives the program a value that is too long"))
        except (Failed, NotSupported) as why:
            self._lose(why)
        if error is not None:
            with contextlib.suppress(BaseException):
                raise error  # so that it has a traceback, which shows how far it came, see swallowed.py
            self.raised.append((error, operation))
        return value, error

    def is_fatal(self, error: BaseException) -> bool:
        """What ends the conversation is not told to the program."""
        return self.lost is not None or isinstance(error, values.Malformed)

    def cannot_tell(self, name: str) -> bytes:
        """A function of the test gave something that cannot be told."""
        raise NotSupported(f"a function of it gives the program {name}")

    def _lose(self, error: Exception, detail: str = "") -> NoReturn:
        if detail:
            error.add_note(detail)
        self.lost = self.lost or error
        raise self.lost from None

    def is_program_error(self, error: BaseException) -> bool:
        """Whether the program raised this."""
        return any(error is raised for raised, _ in self.raised)

    def swallowed(self, is_caught: Callable[[BaseException], bool]) -> BaseException | None:
        """An exception of the program that ended a loop of the test instead of the test."""
        for error, operation in self.raised:
            if operation == peer.CALL and isinstance(error, PYTHONS_OWN) and not is_caught(error):
                return error
        return None


class EntryPoint:
    """What the test calls: the program's function, or its class."""

    def __init__(self, conversation: Conversation, name: str):
        self.__name__ = name
        self._conversation = conversation
        conversation.keep(ENTRY_POINT, self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._conversation.request(peer.CALL, ENTRY_POINT, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return self._conversation.attribute(ENTRY_POINT, name)

    def __instancecheck__(self, instance: object) -> bool:
        return self._conversation.is_instance(instance, ENTRY_POINT)


def verdict(task: dict[str, Any], request: dict[str, Any], sandbox: Sandbox, pipes: tuple[int, int]) -> dict[str, Any]:
    """Test one ``{task_id, prompt, completion, test, entry_point}``: ``{task_id, passed, reason}``, and ``detail``.

    Raises :class:`Unusable` and :class:`NotSupported`.
    """
    test = Test(task)
    conversation = Conversation(Pipes(pipes), test.shared)
    reason, detail = PASSED, ""
    try:
        _start(conversation, task, request, sandbox)
        try:
            test.run(EntryPoint(conversation, task["entry_point"]), conversation)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if conversation.lost:
                raise conversation.lost
            if (error := conversation.swallowed(test.is_caught)) is not None:
                raise error
        finally:
            _limit_memory(2 * TEST_MEMORY)  # a full memory must not keep us from the verdict
    except Unusable:
        raise
    except BaseException as error:
        if isinstance(conversation.lost, NotSupported):
            raise conversation.lost from None
        reason, detail = _why(conversation.lost or error, conversation, test)
    about = {"detail": detail[:MAX_DETAIL]} if detail else {}
    return {"task_id": task["task_id"], "passed": reason == PASSED, "reason": reason, **about}


def _start(conversation: Conversation, task: dict[str, Any], request: dict[str, Any], sandbox: Sandbox) -> None:
    """Send the program and wait until it is loaded. From then on the time limit is for everything together."""
    first = {key: request[key] for key in ("limits", "filter")}
    first["program"] = task["prompt"] + task["completion"]
    first["entry_point"] = task["entry_point"]
    first["classes"] = list(conversation.known)
    try:
        conversation.write(json.dumps(first).encode() + b"\n")
        _expect(conversation, "confined")
    except Failed as error:
        raise Unusable(f"the sandbox did not start ({sandbox.last_error_line() or error})") from None
    conversation.pipes.deadline = time.monotonic() + request["timeout"]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # from now on it ends the process, whatever the test is busy with
    signal.setitimer(signal.ITIMER_REAL, request["timeout"] + GRACE_SECONDS)
    _expect(conversation, "ready")


def _expect(conversation: Conversation, word: str) -> None:
    try:
        message = values.loads(conversation.read())
    except values.Malformed:
        raise Failed("no proper reply") from None
    failed = message.get("failed")
    if isinstance(failed, str) and values.IDENTIFIER.fullmatch(failed):
        raise Failed(f"{failed} while loading")
    if message != {word: True}:
        raise Failed("no proper reply")


def _why(error: BaseException, conversation: Conversation, test: "Test") -> tuple[str, str]:
    """Reason and detail of a verdict: what failed, in words that are few enough to be counted, and where."""
    if isinstance(error, Failed):
        return str(error), _readable(*getattr(error, "__notes__", ()))
    if conversation.is_program_error(error):
        name = type(error).__name__
        return f"an exception called {name}" if name == PASSED else name, _readable(test.line_of(error), error)
    if isinstance(error, AssertionError):
        return "wrong answer", _readable(test.line_of(error))
    if not isinstance(error, Exception):  # SystemExit of a test, say
        raise NotSupported(f"it ended with {type(error).__name__}")
    # whatever a test does with an unexpected value
    return f"the test could not use the answer: {type(error).__name__}", _readable(test.line_of(error), error)


def _readable(*parts: object) -> str:
    """One line without control characters: some of it is what an untrusted program says."""
    texts = []
    for part in parts:
        with contextlib.suppress(Exception):
            texts.append(str(part)[:MAX_DETAIL])
    return ascii(": ".join(filter(None, texts)))[1:-1]


class Test:
    """Prompt and test of a task. Both are the data set's, not the model's; some tests use helpers of the prompt."""

    def __init__(self, task: dict[str, Any]):
        self.sources = {"<prompt>": task["prompt"], "<test>": task["test"]}
        module = sys.modules[NAME] = types.ModuleType(NAME)
        self.names = module.__dict__
        self.entry_point = task["entry_point"]
        self.shared: dict[str, type] = {}  # classes that the program has as well
        self.missing: list[str] = []
        self.is_ready = True
        try:
            exec(_helpers(task["prompt"]), self.names)
            self.shared = {name: value for name, value in self.names.items() if _is_shared(value)}
            self.code = compile(task["test"], "<test>", "exec")
            self.missing = self._missing_names(task["test"])
            exec(self.code, self.names)
        except Exception as error:
            if not isinstance(error, NameError) or error.name not in {*self.missing, self.entry_point}:
                why = f"{type(error).__name__}: {error}"
                raise NotSupported(f"its prompt or its test is no proper program ({why[:MAX_DETAIL]})") from None
            self.is_ready = False  # it uses the program's names before it is called
        if self.is_ready:
            self._check_function()

    def _missing_names(self, source: str) -> list[str]:
        """Names that the test uses and nobody defines: of the library's modules, or else the program's."""
        tree = ast.parse(source)
        named = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in named if not isinstance(node.ctx, ast.Store)}
        stored = {node.id for node in named if isinstance(node.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                stored.add(node.name)
            elif isinstance(node, ast.alias):
                stored.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.arg):
                stored.add(node.arg)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                stored.add(node.name)
        missing = sorted(used - stored - {*self.names, *vars(builtins), self.entry_point})
        for name in (name for name in missing if name in sys.stdlib_module_names):
            self.names[name] = importlib.import_module(name)
        return [name for name in missing if name not in self.names and not name.startswith("__")]

    def _check_function(self) -> Callable[[EntryPoint], object]:
        check = self.names.get("check")
        if not callable(check):
            raise NotSupported("it defines no function check(candidate)")
        return check

    def run(self, tested: EntryPoint, conversation: Conversation) -> None:
        """Raise whatever the test raises. Names that it uses and does not define are the program's, as its classes."""
        if not self.is_ready:
            self.names[self.entry_point] = tested
        for name in self.missing:
            with contextlib.suppress(AttributeError):
                self.names[name] = conversation.attribute(PROGRAM, name)
        if not self.is_ready:
            exec(self.code, self.names)
        check = self._check_function()
        self.names[self.entry_point] = tested
        check(tested)

    def is_caught(self, error: BaseException) -> bool:
        """Whether the test caught this itself."""
        return swallowed.is_caught(error, self.sources)

    def line_of(self, error: BaseException) -> str:
        """Where the test was, with its number: ``line 3: assert f(2) == 4``."""
        lines = self.sources["<test>"].splitlines()
        numbers = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<test>"]
        found = [n for n in numbers if 0 < n <= len(lines)]
        return f"line {found[-1]} of the test: {lines[found[-1] - 1].strip()[:100]}" if found else ""


def _is_shared(value: object) -> bool:
    """Whether this is a class of the prompt whose instances can go by value."""
    if not isinstance(value, type) or value.__module__ != NAME:
        return False
    if issubclass(value, enum.Enum | BaseException) or hasattr(value, "_fields"):
        return True
    return all(base is object or base.__module__ == NAME for base in value.__mro__)


def _helpers(prompt: str) -> CodeType:
    """What the prompt defines by itself. It may end in an open function without a docstring: that gets a body."""
    try:
        return compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return compile(f"{prompt.rstrip()}\n    pass\n", "<prompt>", "exec")


def serve() -> None:
    """Answer requests, one a line, each in a fork of this fresh process.

    An answer is a verdict, ``{"unsupported": why}``, ``{"unusable": why}`` or ``{"signal": number}``.
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
    return {"unsupported": f"it ended this process with status {status}"}


def _answer(request: dict[str, Any], sandbox: Sandbox, pipes: tuple[int, int], writing: int) -> None:
    """The forked process: one verdict, within the time and memory limits; what the test prints goes nowhere.

    Never returns.
    """
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(int(START_SECONDS) + 5)
    _limit_memory(TEST_MEMORY)
    sys.set_int_max_str_digits(0)
    null_device = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null_device, fd)
    try:
        answer = verdict(request.pop("task"), request, sandbox, pipes)
    except NotSupported as error:
        answer = {"unsupported": str(error)}
    except Unusable as error:
        answer = {"unusable": str(error)}
    except BaseException as error:  # SystemExit of a test that is no function, say
        answer = {"unsupported": f"it ended with {type(error).__name__}"}
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
