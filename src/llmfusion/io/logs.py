"""What a process prints and logs, without secrets."""

import logging
import sys
import threading
import traceback
from typing import Any, TextIO

from llmfusion.io.redaction import redacted


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


class RedactedStream:
    """A text stream that passes on whole lines, without secrets; what is no whole line waits for ``flush``.

    A secret that is written in parts is so found all the same. Each thread assembles lines of its own.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self._pending = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Take some text. Returns the number of its characters."""
        waiting = getattr(self._pending, "text", "") + text
        end = max(waiting.rfind("\n"), waiting.rfind("\r")) + 1
        self._pending.text = waiting[end:]
        if end:
            self.stream.write(redacted(waiting[:end]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Take several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is there, whole lines or not."""
        if waiting := getattr(self._pending, "text", ""):
            self._pending.text = ""
            self.stream.write(redacted(waiting))
        self.stream.flush()

    @property
    def buffer(self) -> "_RedactedBytes":
        """The same stream for those who write UTF-8 bytes."""
        return _RedactedBytes(self)


class _RedactedBytes:
    def __init__(self, text: RedactedStream):
        self.text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.text.stream.buffer, name)

    def write(self, data: bytes) -> int:
        self.text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)

    def flush(self) -> None:
        self.text.flush()


def redact_output() -> None:
    """From now on nothing that Python writes in this process to standard output or standard error holds a secret.

    That is: prints, tracebacks, warnings, progress bars, and the log lines of all libraries, also of handlers that
    were made before, with the streams of then. What a process started by this one writes is its own affair.
    """
    logging.setLogRecordFactory(RedactedRecord)
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))


def log_to_stdout() -> None:
    """Print INFO of this package and warnings of others to standard output, where a rule's log file receives them."""
    handler: Any = StrictHandler(sys.stdout)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("llmfusion").setLevel(logging.INFO)
