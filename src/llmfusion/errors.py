"""Errors that speak to the user; the entry points print them without a traceback."""


class UserError(Exception):
    """Something the user can mend. ``str()`` says what was given, what is allowed and what to do."""


class DamagedError(UserError):
    """A file is not what its manifest says."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition``."""
    if not condition:
        raise UserError(message)
