"""Errors that speak to the user; the entry points print them without a traceback."""

import re

# what a terminal obeys, what turns the direction of a line, halves of characters; not lines, tabs and spaces
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(message: object) -> str:
    """A message with question marks for control characters.

    Names of files and tensors, and texts in others' files, may hold them.
    """
    return CONTROL.sub("?", str(message))


class UserError(Exception):
    """Something the user can mend. ``str()`` says what was given, what is allowed and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class DamagedError(UserError):
    """A file is not what its manifest says."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition``."""
    if not condition:
        raise UserError(message)
