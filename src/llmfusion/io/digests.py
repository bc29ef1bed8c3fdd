"""Canonical JSON and its sha256: what identifies a value.

Apart from the pydantic models of a study, which take longer to import than most steps run.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def canonical(value: Any) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, ASCII. Raises ``ValueError`` for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(*parts: str) -> str:
    """sha256 over the parts, a line each, hex."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def fingerprint_of(spec: str, inputs: Iterable[str]) -> str:
    """Fingerprint of an artifact: the hash of its spec and of its inputs' fingerprints, in any order."""
    return digest(spec, *sorted(inputs))
