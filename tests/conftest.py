"""What a test that runs a command in this process changed is as before for the next test: signals, logging, streams."""

import logging
import signal
import sys
from collections.abc import Iterator

import pytest

from llmfusion.io.logs import RedactedStream


@pytest.fixture(autouse=True)
def _same_signals_afterwards() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _same_logging_afterwards() -> Iterator[None]:
    """A step that a test starts in this process sets up logging for its own."""
    root = logging.getLogger()
    own = logging.getLogger("llmfusion")
    before = (root.level, own.level, logging.getLogRecordFactory(), set(root.handlers))
    yield
    root.setLevel(before[0])
    own.setLevel(before[1])
    logging.setLogRecordFactory(before[2])
    for handler in set(root.handlers) - before[3]:
        root.removeHandler(handler)
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        while isinstance(stream := getattr(sys, name), RedactedStream):
            setattr(sys, name, stream.stream)
