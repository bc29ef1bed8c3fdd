"""What processes started by torchrun make in the tests: ``spec["does"]`` by number of the process."""

import errno
import os
import signal
import sys
import time
from typing import Any

from llmfusion.artifacts.job import Job
from llmfusion.errors import UserError
from llmfusion.training import distributed


def make(job: Job) -> None:
    """Do as told; then sum a number over the processes and write it down."""
    does: Any = job.spec["does"][distributed.rank()]
    if does == "mistake":
        raise UserError("the user can mend this")
    if does == "defect":
        raise ZeroDivisionError("nobody expected this")
    if does == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "long":
        stop: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        (job.work / f"running-{distributed.rank()}").write_text(str(os.getpid()))
        while not distributed.any_across_ranks(bool(stop))[0]:
            time.sleep(0.05)
        if distributed.rank() == 0:
            time.sleep(2)  # a save
            (job.work / "saved").touch()
        distributed.barrier()
        sys.exit(143)
    total = distributed.sum_records({"n": 1.0 + distributed.rank()})["n"]
    job.facts.update(total=total, inputs=sorted(job.inputs), minutes=job.minutes, key=job.key)
    if distributed.rank() == 0:
        (job.folder / "made").write_text("by the first")
