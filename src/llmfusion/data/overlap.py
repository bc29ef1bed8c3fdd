"""Samples that share n-grams with a test: the paper's mix holds sets known to overlap HumanEval and GSM8K."""

import re
from collections.abc import Iterable
from typing import Any

SIZES = (13, 8)
COMPARED = ("question", "prompt", "solution", "test", "choices")  # fields of an item; its answer alone is no overlap


def words(text: str) -> list[str]:
    """Lower-case words and numbers; everything else separates."""
    return re.findall(r"[a-z0-9]+", text.lower())


def ngrams(text: str, n: int) -> set[int]:
    """Hashes of all runs of ``n`` words (none if there are fewer)."""
    all_words = words(text)
    return {hash(tuple(all_words[i : i + n])) for i in range(len(all_words) - n + 1)}


class Overlap:
    """n-grams of test items, and how many samples share one."""

    def __init__(self, tests: dict[str, Iterable[dict[str, Any]]]):
        self.grams = {name: {n: set[int]() for n in SIZES} for name in tests}
        self.counts = {name: {str(n): 0 for n in SIZES} for name in tests}
        for name, items in tests.items():
            for item in items:
                text = " ".join(str(value) for key, value in item.items() if key in COMPARED)
                for n in SIZES:
                    self.grams[name][n] |= ngrams(text, n)

    def check(self, text: str) -> bool:
        """Count one sample; returns whether it shares a 13-gram with any test."""
        shared = False
        for n in SIZES:
            grams = ngrams(text, n) if self.grams else set()
            for name, sizes in self.grams.items():
                overlaps = not grams.isdisjoint(sizes[n])
                self.counts[name][str(n)] += overlaps
                shared |= overlaps and n == SIZES[0]
        return shared
