"""Run a function in several processes of this node through torchrun, and bring back the first one's result.

The process that was started keeps the lease, the draft and the publication; the processes it starts only compute, and
the first of them writes resume state and weights. They live in sessions of their own, so that a signal to the job's
process group reaches only this process, which passes SIGTERM, or SIGINT (Ctrl-C) as SIGTERM, on to them; torchrun
ignores it and so does not cut their last save short after 30 s. When this process is killed they are killed with it: a
lease whose process is gone has nobody writing behind it.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError
from llmfusion.io.files import write_file
from llmfusion.io.logs import log_to_stdout, redact_output
from llmfusion.io.redaction import redacted

logger = logging.getLogger(__name__)
LIBC = ctypes.CDLL(None)  # loaded before a fork, not after
PR_SET_PDEATHSIG = 1
STOPPED = 143  # exit status of processes that SIGTERM or SIGINT ended
STOPPING = (signal.SIGTERM, signal.SIGINT)


def run_processes(entry: str, number: int, state: dict[str, Any], folder: Path) -> Any:
    """Call ``entry(state)`` (``"package.module:function"``) in ``number`` processes of this node, in one process group.

    ``state`` is what JSON holds; files that the processes exchange lie in ``folder``. Returns what the first
    process's call returned, as JSON. Raises the first failing process's error with its message (:class:`UserError`,
    ``OSError``); ends with status 143 when they were stopped.
    """
    _require_devices(number)
    with tempfile.TemporaryDirectory(prefix="processes-", dir=folder) as name:
        exchange = Path(name)
        (exchange / "call.json").write_text(json.dumps({"entry": entry, "state": state}))
        logger.info("%d processes share the samples of every step", number)
        status = _torchrun(number, exchange)
        _raise_failures(exchange, number, status)
        return json.loads((exchange / "result.json").read_bytes())


def _require_devices(number: int) -> None:
    """Raise :class:`UserError` where two processes would share a GPU. Without any GPU, processes share the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device for device in visible.split(",") if device]
    if devices and len(devices) < number:
        raise UserError(
            f"the model asks for {number} processes, one GPU each, and this job sees {len(devices)} "
            f"(CUDA_VISIBLE_DEVICES={visible}): ask for {number} GPUs (resource gpu), "
            "or change the model's `processes` in the study"
        )


def _torchrun(number: int, exchange: Path) -> int:
    """Run torchrun until all processes have ended. Returns its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command += ["--signals-to-handle", "SIGINT", "-m", "llmfusion.training.launch", str(exchange)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    # torchrun's own messages go to a file; what the processes print goes to this process's output
    with open(exchange / "torchrun.log", "wb") as log:
        child = subprocess.Popen(
            command, stderr=log, env=environment, start_new_session=True, preexec_fn=_prepare_torchrun
        )
        stopped: list[bool] = []
        previous = {n: signal.signal(n, lambda *_: _pass_on_sigterm(exchange, stopped)) for n in STOPPING}
        try:
            return child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if child.poll() is None:  # an exception here: nobody may go on writing
                child.kill()
                child.wait()
            if stopped:
                logger.info("stopped by a signal")


def _pass_on_sigterm(exchange: Path, stopped: list[bool]) -> None:
    stopped.append(True)
    (exchange / "stop").touch()  # for those that have not begun yet
    for path in exchange.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), signal.SIGTERM)
        except (ProcessLookupError, ValueError):
            continue


def _raise_failures(exchange: Path, number: int, status: int) -> None:
    """Raise for what went wrong: a process's own error first, else what is known of those that left none."""
    if status == 0 and (exchange / "result.json").exists():
        return
    ends = [_end_of(exchange, rank) for rank in range(number)]
    for end in ends:
        if "error" in end:
            raise UserError(end["error"])
        if "errno" in end:
            raise OSError(end["errno"], end["message"])
    if all("stopped" in end for end in ends):
        sys.exit(STOPPED)
    messages = ["the processes of this training failed:"]
    messages += [
        f"process {rank} of {number} ended without a message: killed, perhaps for its memory"
        for rank, end in enumerate(ends)
        if not end
    ]
    messages += [end["traceback"] for end in ends if "traceback" in end]
    messages += [(exchange / "torchrun.log").read_text(errors="replace")[-2000:]]
    raise UserError("\n".join(messages))


def _end_of(exchange: Path, rank: int) -> dict[str, Any]:
    """How a process ended, as it left it; empty for one that succeeded or was killed."""
    path = _end_path(exchange, rank)
    return json.loads(path.read_bytes()) if path.exists() else {}


def _end_path(exchange: Path, rank: int) -> Path:
    return exchange / f"end-{rank}.json"


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (Linux)."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare_torchrun() -> None:
    _die_with_parent()
    # SLURM signals all processes of a job; torchrun would kill the others after 30 s
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(exchange: Path) -> int:
    """One of the processes: read the call, join the others, make it; leaves ``result.json`` or ``end-N.json``."""
    _die_with_parent()
    os.dup2(1, 2)  # torchrun's stderr is read only by the process that started it
    rank = int(os.environ["RANK"])
    for number in STOPPING:
        signal.signal(number, lambda *_: sys.exit(STOPPED))
    redact_output()
    log_to_stdout()
    write_file(exchange / f"{rank}.pid", str(os.getpid()).encode())
    status = 1
    try:
        if (exchange / "stop").exists():
            sys.exit(STOPPED)
        _call(exchange, rank)
        return 0
    except SystemExit as exit_:
        status = int(exit_.code or 0)
        end: dict[str, Any] = {"stopped": True}
    except UserError as error:
        end = {"error": str(error)}
    except Exception as error:
        end = {"traceback": f"process {rank}:\n{traceback.format_exc()}"}
        if isinstance(error, OSError) and error.errno:
            end = {"errno": error.errno, "message": str(error)}
    _end_path(exchange, rank).write_text(redacted(json.dumps(end)))
    return status


def _call(exchange: Path, rank: int) -> None:
    from llmfusion.training import distributed

    call = json.loads((exchange / "call.json").read_bytes())
    module, _, function = call["entry"].partition(":")
    with distributed.process_group():
        result = getattr(import_module(module), function)(call["state"])
        distributed.barrier()
    if rank == 0:
        (exchange / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
