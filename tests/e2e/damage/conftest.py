"""A copy of the finished study to be damaged, and its steps, run in this process."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmfusion.cli.main import main
from llmfusion.io.digests import canonical
from tests.e2e.damage.finished import (
    ACCEPTED,
    Copy,
    Make,
    assert_nothing_is_left_of,
    command_of,
    put_back,
    remove_artifact,
)


@pytest.fixture(scope="session")
def originals(made: Path) -> Copy:
    """Results and logs of the finished study."""
    base = made / "runs/tiny"
    paths = (p for name in ("results", "logs") for p in sorted((base / name).rglob("*")) if p.is_file())
    return {str(p.relative_to(base)): p for p in paths}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, originals: Copy) -> Path:
    place = tmp_path_factory.mktemp("damage") / "runs/tiny"
    put_back(originals, place, 0)
    return place


@pytest.fixture
def study(originals: Copy, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the finished study, as the working directory; damage it at will."""
    monkeypatch.chdir(place)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    began = time.time()
    yield place
    for number, handler in before.items():
        signal.signal(number, handler)
    put_back(originals, place, began - 1)


@pytest.fixture
def message_of_step(study: Path, capsys: pytest.CaptureFixture[str]) -> Make:
    """Runs the step that makes an artifact, with its options ``changed`` (all of them, where the kind is).

    Returns ``ACCEPTED``, or the step's error message, with nothing left of the artifact.
    """

    def make(address: str, **changed: Any) -> str:
        remove_artifact(address)
        words = command_of(address)
        if changed:
            at = words.index("--spec") + 1
            spec = json.loads(words[at])
            section = next(spec[key] for key in ("run", "merge", "base") if key in spec)
            if "kind" in changed:
                section.clear()
            section.update(changed)
            words[at] = canonical(spec)
        status = main(words[words.index("step") :])
        errors = capsys.readouterr().err
        if status == 0:
            return ACCEPTED
        assert status == 1
        assert_nothing_is_left_of(address)
        return errors[errors.index("error: ") + 7 :]

    return make
