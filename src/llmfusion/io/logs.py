"""Log lines of a job: the bare message on standard output, without secrets."""

import logging
import sys
import traceback
from typing import TextIO

from llmfusion.errors import redacted


class RedactedRecord(logging.LogRecord):
    """A record of this package or of any library, whose message and traceback hold no secret."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if isinstance(self.exc_info, tuple):
            self.exc_text = redacted("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        """The message with its arguments, redacted."""
        return redacted(super().getMessage())


class StrictHandler(logging.StreamHandler[TextIO]):
    """Writes to standard output; a line that cannot be written, on a full disk perhaps, fails the job."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what kept a record from being written, instead of going on without it."""
        raise


def log_to_stdout() -> None:
    """Print INFO of this package and warnings of others to standard output, where a rule's log file receives them.

    Secrets are removed from the records themselves, so that handlers which libraries install show none either.
    """
    logging.setLogRecordFactory(RedactedRecord)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StrictHandler(sys.stdout)], force=True)
    logging.getLogger("llmfusion").setLevel(logging.INFO)
