"""Rows that cannot be used: counted by reason, the first few of each named."""

from collections import Counter
from typing import Any

NAMED = 5  # rows a reason


class Rejected:
    """Rows left out, by reason, with the first few of each named."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        """Count a row, called ``name``, under its reason."""
        self.counts[reason] += 1
        if len(self.first.setdefault(reason, [])) < NAMED:
            self.first[reason].append(str(name))

    def facts(self) -> dict[str, Any]:
        """By reason: how many (``count``), and the names of the ``first``; for manifests."""
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in sorted(self.counts.items())}
