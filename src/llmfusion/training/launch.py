"""Start a step in several processes of this node through torchrun, and bring back what they found.

The process that was started keeps the lease, the draft and the publication; the processes it starts only compute, and the
first of them writes resume state and weights. They live in sessions of their own, so that a signal to the job's process group
reaches only this process, which passes SIGTERM on to them; torchrun ignores it and so does not cut their last save short
after 30 s. When this process is killed they are killed with it: a lease whose process is gone has nobody writing behind it.
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

logger = logging.getLogger(__name__)
LIBC = ctypes.CDLL(None)  # loaded before a fork, not after


def run_processes(entry: str, number: int, state: dict[str, Any], folder: Path) -> Any:
    """Call ``entry(state)`` (``"package.module:function"``) in ``number`` processes of this node, joined in a process group.

    ``state`` is what JSON holds; files that the processes exchange lie in ``folder``. Returns what the first process's call
    returned, as JSON. Raises what the first failing process raised, in its words (:class:`UserError`), and ends with status 143
    when they were stopped.
    """
    _require_devices(number)
    with tempfile.TemporaryDirectory(prefix="processes-", dir=folder) as name:
        place = Path(name)
        (place / "call.json").write_text(json.dumps({"entry": entry, "state": state}))
        logger.info("%d processes share the samples of every step", number)
        status = _torchrun(number, place)
        _raise_failures(place, number, status)
        return json.loads((place / "result.json").read_bytes())


def _require_devices(number: int) -> None:
    """Raise :class:`UserError` where two processes would share a GPU. Without any GPU, processes share the cores."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [device for device in (seen or "").split(",") if device]
    if seen is not None and devices and len(devices) < number:
        raise UserError(
            f"the model asks for {number} processes, one GPU each, and this job sees {len(devices)} (CUDA_VISIBLE_DEVICES={seen}): "
            f"ask for {number} GPUs (resource gpu), or change the model's `processes` in the study"
        )


def _torchrun(number: int, folder: Path) -> int:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    words += ["--signals-to-handle", "SIGINT", "-m", "llmfusion.training.launch", str(folder)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    with open(folder / "torchrun.log", "wb") as log:  # its own words; what the processes print goes where ours goes
        child = subprocess.Popen(words, stderr=log, env=environment, start_new_session=True, preexec_fn=_as_torchrun)
        stopped: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda *_: _pass_on(folder, stopped))
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if child.poll() is None:  # an exception here: nobody may go on writing
                child.kill()
                child.wait()
            if stopped:
                logger.info("stopped by SIGTERM")


def _pass_on(folder: Path, stopped: list[int]) -> None:
    stopped.append(1)
    (folder / "stop").touch()  # for those that start only now
    for path in folder.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), signal.SIGTERM)
        except (ProcessLookupError, ValueError):
            continue


def _raise_failures(folder: Path, number: int, status: int) -> None:
    """Raise for what went wrong: a process's own words first, else what is known of those that left none."""
    if status == 0 and (folder / "result.json").exists():
        return
    ends = {
        rank: json.loads(path.read_bytes()) if (path := folder / f"end-{rank}.json").exists() else {}
        for rank in range(number)
    }
    for end in ends.values():
        if "error" in end:
            raise UserError(end["error"])
        if "errno" in end:
            raise OSError(end["errno"], end["said"])
    if all("stopped" in end for end in ends.values()):
        sys.exit(143)
    said = [
        f"process {rank} of {number} ended without a word: killed, perhaps for its memory"
        for rank, end in ends.items()
        if not end
    ]
    said += [end["traceback"] for end in ends.values() if "traceback" in end]
    raise UserError(
        "\n".join(
            [
                "the processes of this training did not end well:",
                *said,
                (folder / "torchrun.log").read_text(errors="replace")[-2000:],
            ]
        )
    )


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (Linux)."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _as_torchrun() -> None:
    _die_with_parent()
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # SLURM signals all processes of a job; torchrun would kill the others after 30 s


def main(folder: Path) -> int:
    """One of the processes: read the job, join the others, make it; leaves ``result.json`` or ``end-N.json``."""
    _die_with_parent()
    os.dup2(1, 2)  # torchrun's stderr is not read by anyone but the one that started it
    number = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    write_file(folder / f"{number}.pid", str(os.getpid()).encode())
    try:
        if (folder / "stop").exists():
            sys.exit(143)
        _call(folder, number)
    except SystemExit as end:
        return _leave(folder, number, end.code, {"stopped": True})
    except UserError as error:
        return _leave(folder, number, 1, {"error": str(error)})
    except OSError as error:
        return _leave(
            folder,
            number,
            1,
            {"errno": error.errno, "said": str(error)} if error.errno else {"traceback": traceback.format_exc()},
        )
    except Exception:
        return _leave(folder, number, 1, {"traceback": f"process {number}:\n{traceback.format_exc()}"})
    return 0


def _leave(folder: Path, number: int, status: Any, end: dict[str, Any]) -> int:
    (folder / f"end-{number}.json").write_text(json.dumps(end))
    return int(status or 0)


def _call(folder: Path, number: int) -> None:
    from llmfusion.training import distributed

    call = json.loads((folder / "call.json").read_bytes())
    module, _, function = call["entry"].partition(":")
    with distributed.joined():
        result = getattr(import_module(module), function)(call["state"])
        distributed.barrier()
    if number == 0:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
