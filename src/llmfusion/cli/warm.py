"""Run a command whose steps do not each import torch anew: ``llmfusion warm -- snakemake --profile profiles/mini``.

On miniature models a step takes less time than its imports. This process imports them once and then forks for every
step that the command starts; the step's own process sends its arguments, environment, umask and files here, forwards
signals, and ends as the fork ended. What a step does is the same either way, and so is every byte of its result. For
machines without a GPU: a driver that was started before a fork cannot be used after it.
"""

import argparse
import array
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.io.files import default_rights

ADDRESS = "LLMFUSION_WARM"  # environment variable: the socket of the process that forks
FORWARDED = (signal.SIGTERM, signal.SIGINT)
DRIVER = Path("/proc/driver/nvidia")
IMPORTED = (
    "torch",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "llmfusion.evaluation.answers",
    "llmfusion.evaluation.sandbox",
    "llmfusion.fusion.objective",
    "llmfusion.merging.engine",
    "llmfusion.models.scratch",
    "llmfusion.reporting.tables",
    "llmfusion.teachers.capture",
    "llmfusion.teachers.generation",
    "llmfusion.training.loop",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
)


# ------------------------------------------------------------------------------------------------ the step's own
# process
def ask(arguments: list[str]) -> int:
    """Have ``llmfusion ARGUMENTS`` run in a fork, with this process's environment, folder and files.

    Returns its exit status. A fork ended by a signal ends this process by the same one. Raises :class:`UserError`
    where nobody listens.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[ADDRESS])
        except OSError as error:
            place = f"{ADDRESS} names {os.environ[ADDRESS]}, where nobody listens ({error.strerror})"
            raise UserError(f"{place}: unset it, or run under `llmfusion warm`") from None
        environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
        umask = 0o777 & ~default_rights()
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": environment, "umask": umask}
        _send(connection, request, [0, 1, 2])
        pid = _receive(connection)["pid"]
        for number in FORWARDED:
            signal.signal(number, lambda n, _: _signal(pid, n))
        status = _receive(connection)["status"]
    if os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def _end_by(number: int) -> None:
    """End this process by a signal, as the fork was."""
    for forwarded in FORWARDED:
        signal.signal(forwarded, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _send(connection: socket.socket, message: dict[str, Any], files: list[int]) -> None:
    body = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    connection.sendmsg([len(body).to_bytes(8, "big")], rights)
    connection.sendall(body)


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb", buffering=0) as file:
        line = file.readline()
    if not line:
        raise UserError("the process of `llmfusion warm` has ended; run again")
    message: dict[str, Any] = json.loads(line)
    return message


# ---------------------------------------------------------------------------------------------- the process that forks
class Server:
    """Forks a process for every request on its socket, reports its status, and ends it when its client has gone."""

    def __init__(self, listening: socket.socket):
        self.listening = listening
        self.selector = selectors.DefaultSelector()
        self.running: dict[int, tuple[int, socket.socket]] = {}  # by process: its pidfd, and the client's connection
        self.selector.register(listening, selectors.EVENT_READ, self._accept)

    def serve(self, command: subprocess.Popen[bytes]) -> int:
        """Until the command and all forks have ended. Returns the command's exit status."""
        ended = os.pidfd_open(command.pid)
        self.selector.register(ended, selectors.EVENT_READ, lambda: self.selector.unregister(ended))
        while ended in self.selector.get_map() or self.running:
            for key, _ in self.selector.select():
                key.data()
        os.close(ended)
        return command.wait()

    def _accept(self) -> None:
        connection, _ = self.listening.accept()
        files: list[int] = []
        try:
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            with connection.makefile("rb") as file:
                request = json.loads(file.read(int.from_bytes(size, "big")))
        except (OSError, ValueError):  # the client was ended while it sent its request
            for number in files:
                os.close(number)
            connection.close()
            return
        if (pid := os.fork()) == 0:
            self._become(request, files, connection)
        for number in files:
            os.close(number)
        ended = os.pidfd_open(pid)
        self.running[pid] = ended, connection
        self.selector.register(ended, selectors.EVENT_READ, lambda: self._ended(pid))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._gone(pid))
        self._tell(connection, {"pid": pid})

    def _ended(self, pid: int) -> None:
        ended, connection = self.running.pop(pid)
        self.selector.unregister(ended)
        with contextlib.suppress(KeyError):
            self.selector.unregister(connection)
        os.close(ended)
        self._tell(connection, {"status": os.waitpid(pid, 0)[1]})
        connection.close()

    def _gone(self, pid: int) -> None:
        """The client was killed, and so the fork must be, unless it ended in the same moment."""
        if pid in self.running:
            self.selector.unregister(self.running[pid][1])
            os.kill(pid, signal.SIGKILL)

    def _tell(self, connection: socket.socket, message: dict[str, int]) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _become(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> NoReturn:
        """The forked process turns into the step."""
        status = 1
        try:
            self._take_over(request, files, connection)
            status = main(request["arguments"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _take_over(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> None:
        """Drop what is the server's own, and take the client's files, folder, environment and arguments."""
        for ended, other in self.running.values():
            os.close(ended)
            other.close()
        for own in (self.selector, self.listening, connection):
            own.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.umask(request["umask"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        sys.argv[1:] = request["arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command to run."""
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND ...",
        help="e.g. -- snakemake --profile profiles/mini results/table2.csv",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with a socket to ask in its environment. Returns its exit status."""
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words:
        print("usage: llmfusion warm -- snakemake --profile profiles/mini results/table2.csv", file=sys.stderr)
        return 2
    if DRIVER.exists():
        reason = f"this machine has a GPU ({DRIVER}): a driver does not survive a fork"
        print(f"error: {reason}. Run the command without `llmfusion warm`", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="llmfusion-warm-") as folder, socket.socket(socket.AF_UNIX) as listening:
        address = str(Path(folder) / "socket")
        try:
            listening.bind(address)
        except OSError as error:
            advice = "set TMPDIR to a local folder with a shorter path"
            print(f"error: {address}: no socket can be made there ({error}); {advice}", file=sys.stderr)
            return 2
        listening.listen(64)
        try:
            command = subprocess.Popen(words, env={**os.environ, ADDRESS: address})
        except OSError as error:
            print(f"error: {words[0]}: {error.strerror}", file=sys.stderr)
            return 127
        status = _serve(listening, command)
    return status if status >= 0 else 128 - status


def _serve(listening: socket.socket, command: subprocess.Popen[bytes]) -> int:
    """Import what steps need while the command plans, then fork for every step. Returns the command's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts the command too, which ends its steps
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what all forks share stays shared
    return Server(listening).serve(command)
