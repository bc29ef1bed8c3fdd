"""What processes started by torchrun do in the tests: ``state["does"]`` by rank."""

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError
from llmfusion.training import distributed


def call(state: dict[str, Any]) -> dict[str, Any]:
    """Do what ``state`` says of this rank; then sum a number over the processes, and write it down in ``folder``."""
    does = state["does"][distributed.rank()]
    folder = Path(state["folder"])
    if does == "mistake":
        raise UserError("the user can mend this")
    if does == "defect":
        raise ZeroDivisionError("nobody expected this")
    if does == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "long":
        _run_until_stopped(folder)
    total = distributed.all_reduce_record({"n": 1.0 + distributed.rank()})["n"]
    if distributed.rank() == 0:
        (folder / "made").write_text("by the first")
    return {"total": total, "rank": distributed.rank()}


def _run_until_stopped(folder: Path) -> None:
    stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    (folder / f"running-{distributed.rank()}").write_text(str(os.getpid()))
    while not distributed.any_across_ranks(bool(stop))[0]:
        time.sleep(0.05)
    if distributed.rank() == 0:
        time.sleep(2)  # a save
        (folder / "saved").touch()
    distributed.barrier()
    sys.exit(143)
