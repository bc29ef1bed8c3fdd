"""What identifies a value: its one JSON text, and the hash of that. Without the study's models, which take longer to import than most steps run."""

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(*parts: str) -> str:
    """sha256 over the parts, hex."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
