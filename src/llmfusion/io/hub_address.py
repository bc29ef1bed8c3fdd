"""The address of the hub that the user has set, checked where it enters: libraries read it when they are imported."""

import os
from urllib.parse import urlsplit

from llmfusion.errors import UserError

VARIABLE = "HF_ENDPOINT"


def require_hub_address() -> None:
    """Raise :class:`UserError` for an ``HF_ENDPOINT`` that is no address; its value may hold a password."""
    address = os.environ.get(VARIABLE, "")
    try:
        parts = urlsplit(address)
        is_address = not address or (parts.scheme in ("http", "https") and bool(parts.hostname))
        _ = parts.port  # raises, too
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"{VARIABLE} is no address: expected http(s)://host[:port], or unset it for the public hub")
