"""The log of a job: everything that its process and its children write, from the moment it is the one that works.

Snakemake removes a rule's log when it starts a job, also one that will only wait because another job makes the same
artifact. So the job that works keeps a second name of its log beside it, from which the waiting one puts it back.
"""

import contextlib
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from llmfusion.errors import UserError


def second_name(log: Path) -> Path:
    """The name under which the job that works keeps its log, whatever happens to ``log``."""
    return log.with_name(f".{log.name}.kept")


def put_back(log: Path) -> None:
    """Give the log of the job that works its name again, if Snakemake has removed it for another job."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(second_name(log), log)


@contextlib.contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Send standard output and error of this process and of those it starts to ``log``, after what is there.

    They stay there after the ``with``, for whatever is said about its end. Raises :class:`UserError` for a log that
    cannot be written, and ``OSError`` if the file system did not keep what was written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"{log}: the log of this job cannot be written: {error.strerror}; nothing was made") from None
    _flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    _replace_by_link(log, second_name(log))
    try:
        yield
    finally:
        _replace_by_link(second_name(log), log)
        second_name(log).unlink(missing_ok=True)


def report(text: str, log: Path | None) -> None:
    """Print an error; also to ``log`` where this process has not opened it and no other one works with it.

    Snakemake prints the log of a job that failed, not what SLURM kept of its output.
    """
    print(text, file=sys.stderr)
    if log is not None and not log.exists():
        put_back(log)
        with contextlib.suppress(OSError), open(log, "x", encoding="utf-8") as file:
            print(text, file=file)


def sync() -> None:
    """Raise ``OSError`` unless everything that was written to standard output and error has reached its file."""
    _flush()
    for number in (1, 2):
        if stat.S_ISREG(os.fstat(number).st_mode):
            os.fsync(number)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _replace_by_link(source: Path, name: Path) -> None:
    """Make ``name`` another name of the file ``source``, in one step; leave it where there is no such file."""
    passing = name.with_name(f".{uuid.uuid4().hex}.link")
    with contextlib.suppress(FileNotFoundError):
        os.link(source, passing)
        os.replace(passing, name)  # does nothing where both are the same file already
        passing.unlink(missing_ok=True)
