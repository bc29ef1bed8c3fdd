"""Errors that speak to the user; the entry points print them without a traceback."""


class UserError(Exception):
    """Something the user can mend: what was given, what is allowed, what to do."""


class DamagedError(UserError):
    """A file is not what its manifest says."""
