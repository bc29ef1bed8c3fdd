"""Captures and tables killed at any moment: one chunk at most is read twice, and nobody sees a mixture."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfusion.artifacts.store import Draft, draft_folder, publish, read
from llmfusion.artifacts.verification import Verification
from llmfusion.errors import DamagedError
from llmfusion.study.addresses import manifest_of, output_of
from tests.e2e.kills.child import (
    CACHE,
    MERGED,
    MODEL,
    Ended,
    capture,
    copied,
    files_of,
    kill_and_go_on,
    left_over,
    merge,
    table,
    train,
)


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


def test_a_kill_while_a_dead_writers_lease_is_taken_over_leaves_one_writer_and_no_lease(tmp_path: Path) -> None:
    """Killed before each thing that is done to a file, then by another run before each thing that it does."""
    whole = tmp_path / "whole"
    whole.mkdir()
    done = table(whole, "new")
    dead = tmp_path / "dead"
    dead.mkdir()
    held = done.first("os.link") + 1  # the lease is there from here on
    assert table(dead, "new", kill_at=held + 3).status == -signal.SIGKILL
    assert (dead / "work/tables/table2/lease").exists()
    number = 0
    while True:
        number += 1
        place = copied(dead, f"again-{number}")
        killed = table(place, "new", kill_at=number)
        if killed.status == 0:
            break
        assert table(place, "new").status == 0
        assert contents(place) == contents(whole), killed.events[-1]
        assert not (place / "work/tables/table2/lease").exists()
    assert any("stale-" in event for event in killed.events)
    assert number > 31


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_merge_that_is_killed_goes_on_to_the_same_bytes_and_repeats_at_most_one_tensor(
    start: Callable[[str], Path], every: int
) -> None:
    with_models = with_three_models(start(f"merge-{every}"))
    done = merge(copied(with_models, f"merged-{every}"))
    assert done.status == 0, done.output
    expected = files_of(with_models.with_name(f"merged-{every}"), MERGED)
    assert len(done.events) > 31
    assembled = done.first("os.remove", "journal.jsonl")  # all tensors are there; a kill from here on begins anew
    for number in range(1, len(done.events) + 1, every):
        place = copied(with_models, f"merge-killed-{every}-{number}")
        killed, again = kill_and_go_on(merge, place, number, MERGED, expected)
        assert left_over(place, MODEL, "models/base/a", "models/base/b", MERGED) == [], number
        if number <= assembled:
            assert tensors_of(killed) + tensors_of(again) <= tensors_of(done) + 1, number


def tensors_of(ended: Ended) -> int:
    """Tensors that a merge has noted in its journal."""
    return sum(event == f"open work/{MERGED}/merge/journal.jsonl" for event in ended.events)


def with_three_models(place: Path) -> Path:
    """A folder with a pivot and two models around it."""
    from safetensors.torch import load_file, save_file

    assert train(place).status == 0
    pivot = (place / output_of(MODEL)).parent
    facts = read(pivot / "manifest.json", None).facts
    for number, name in enumerate("ab", 1):
        output = place / output_of(f"models/base/{name}")
        draft = Draft(f"models/base/{name}", "{}", {}, draft_folder(output, "token"), dict(facts))
        shutil.copytree(pivot, draft.folder)
        for record in ("manifest.json", "provenance.json"):
            (draft.folder / record).unlink()
        weights = draft.folder / "model.safetensors"
        tensors = {key: tensor + number * 0.01 * tensor.sin() for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        publish(draft, output, {})
    return place


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
    """All files of the table and beside it; of its provenance, which holds times, that it is there and sound."""
    files = {p.name: p.read_bytes() for p in (place / "results").iterdir()}
    walk = Verification(place)
    assert walk.verify("tables/table2")
    assert walk.mismatches == []
    return files | {"table2.provenance.json": b""}
