"""Errors that speak to the user; the entry points print them without a traceback."""

import os
import re

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


class UserError(Exception):
    """Something the user can mend. ``str()`` says what was given, what is allowed and what to do."""


class DamagedError(UserError):
    """A file is not what its manifest says."""


def redacted(text: str) -> str:
    """``text`` without values of environment variables whose names suggest secrets, and without passwords in addresses.

    Libraries put their arguments into their messages, and a log is what people send each other.
    """
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return re.sub(r"(?<=://)[^/\s@]+@", "<user>@", text)


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition``."""
    if not condition:
        raise UserError(message)
