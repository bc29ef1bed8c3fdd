"""Captures and tables killed at any moment: one chunk at most is read twice, and nobody sees a mixture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmfusion.artifacts.store import read
from llmfusion.errors import DamagedError
from llmfusion.study.addresses import manifest_of
from tests.e2e.kills.child import CACHE, MODEL, capture, copied, files_of, kill_and_go_on, left_over, table, train


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_capture_that_is_killed_goes_on_to_the_same_bytes_and_loses_at_most_one_chunk(
    start: Callable[[str], Path], every: int
) -> None:
    with_model = start(f"captured-{every}")
    assert train(with_model).status == 0
    place = copied(with_model, f"whole-cache-{every}")
    done = capture(place)
    assert done.status == 0, done.output
    expected = files_of(place, CACHE)
    assert sum(name.startswith("piece") for name in expected) == 4
    for number in range(1, len(done.events) + 1, every):
        place = copied(with_model, f"capture-killed-{every}-{number}")
        killed, again = kill_and_go_on(capture, place, number, CACHE, expected)
        assert left_over(place, MODEL, "teachers/base/p") == [], number
        assert [p.name for p in (place / "results/teachers/base/p").glob(".*")] == [], number
        chunks_read = killed.output.count("tokens/s") + again.output.count("tokens/s")
        assert chunks_read <= 5, number


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_kill_while_a_table_is_published_shows_no_mixture(tmp_path: Path, there: bool) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert table(whole, "new").status == 0
    number = 0
    while True:
        number += 1
        place = tmp_path / f"table-{number}"
        place.mkdir()
        if there:
            assert table(place, "old").status == 0
        killed = table(place, "new", kill_at=number)
        if killed.status == 0:
            break
        assert text_of_table(place) in ("new", "refused", "old" if there else ""), killed.events[-1]
        assert table(place, "new").status == 0
        assert contents(place) == contents(whole)
    assert number > 20


def text_of_table(place: Path) -> str:
    """What both files of a table hold; ``refused`` where its reader refuses it."""
    try:
        text: str = read(manifest_of(place / "results/table2.csv"), memory=None).spec["text"]
    except DamagedError:
        return "refused"
    for suffix in ("csv", "md"):
        assert (place / f"results/table2.{suffix}").read_text() == f"{suffix}: {text}"
    return text


def contents(place: Path) -> dict[str, bytes]:
    """All files of the table and beside it."""
    return {p.name: p.read_bytes() for p in (place / "results").iterdir()}
