"""What every program of the workflow shares: run in this process, in an empty directory."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmfusion import step
from llmfusion.artifacts import draft_folder, read
from llmfusion.config.plan import digest
from llmfusion.errors import UserError
from llmfusion.lease import Lease
from llmfusion.step import Job, run

OUT = Path("results/models/base/p/manifest.json")
WORK = Path("work/models/base/p")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def start(build: Callable[[Job], None], out: Path = OUT, spec: str = '{"n":1}', *more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["step", "--spec", spec, "--out", str(out), *more])
        return run("train", build)

    return start


def good(job: Job) -> None:
    (job.folder / "a.txt").write_text(f"n={job.spec['n']}")
    job.facts["n"] = job.spec["n"]


def never(job: Job) -> None:
    raise AssertionError("built although it was there")


def failing(error: BaseException) -> Callable[[Job], None]:
    def build(job: Job) -> None:
        (job.folder / "half.txt").write_text("half")
        (job.work / "state").write_text("resume from here")
        raise error

    return build


def drafts() -> list[Path]:
    return list(OUT.parent.parent.glob(f".{OUT.parent.name}.*.draft*"))


def nothing_half_visible() -> bool:
    return not OUT.parent.exists() and not drafts() and not (WORK / "lease").exists()


def test_an_artifact_is_made_with_its_facts_and_the_command_in_the_log(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(good) == 0
    found = read(OUT)
    assert (found.facts, found.file("a.txt").read_text()) == ({"n": 1}, "n=1")
    assert capsys.readouterr().out.startswith("# python -m llmfusion.train --spec '{\"n\":1}' --out results/models/base/p/manifest.json\n")


def test_a_finished_artifact_is_adopted_unchanged(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    start(good)
    before = OUT.stat().st_mtime_ns
    assert start(never) == 0
    assert OUT.stat().st_mtime_ns == before
    assert "adopted" in capsys.readouterr().out


def test_another_spec_or_damage_is_made_again(start: Callable) -> None:
    start(good)
    assert start(good, OUT, '{"n":2}') == 0
    assert read(OUT).facts == {"n": 2}
    (OUT.parent / "a.txt").write_text("n=3")
    assert start(good, OUT, '{"n":2}') == 0
    assert read(OUT).file("a.txt").read_text() == "n=2"


def test_a_users_mistake_is_one_line_and_leaves_only_resume_state(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(failing(UserError("give less"))) == 1
    assert capsys.readouterr().err == "error: give less\n"
    assert nothing_half_visible()
    assert (WORK / "state").read_text() == "resume from here"


def test_resume_state_goes_when_the_artifact_is_there_but_no_waiting_writers_file(start: Callable) -> None:
    (WORK / "state").mkdir(parents=True)
    (WORK / "state/weights").write_text("w")
    (WORK / "old.txt").write_text("o")
    (WORK / "lease.waiting").write_text("a waiting writer is about to link this")
    assert start(good) == 0
    assert [p.name for p in WORK.iterdir()] == ["lease.waiting"]


class SafetensorError(Exception):
    """safetensors' own is no OSError."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_what_is_free(start: Callable, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert start(failing(error)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: the disk is full while making {OUT}: ")
    assert "MiB free in" in told
    assert "Traceback" not in told
    assert nothing_half_visible()


def test_a_disk_that_fills_while_publishing_leaves_the_old_artifact(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    start(good)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmfusion.artifacts.write_file", full)
    assert start(good, OUT, '{"n":2}') == 1
    assert read(OUT).facts == {"n": 1}
    assert not drafts()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ValueError("a defect"), KeyError("x")])
def test_a_defect_keeps_its_traceback_but_leaves_nothing(start: Callable, error: Exception) -> None:
    with pytest.raises(type(error)):
        start(failing(error))
    assert nothing_half_visible()


def test_sigterm_ends_with_143_and_leaves_nothing(start: Callable) -> None:
    def build(job: Job) -> None:
        (job.folder / "half").write_text("")
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        start(build)
    assert caught.value.code == 143
    assert nothing_half_visible()


def test_a_draft_that_a_killed_job_left_is_not_part_of_the_next(start: Callable) -> None:
    left = draft_folder(OUT, "of a killed job")
    left.mkdir(parents=True)
    (left / "left.txt").write_text("from a killed job")
    assert start(good) == 0
    assert list(read(OUT).manifest["files"]) == ["a.txt"]


def test_inputs_are_verified_before_anything_is_built(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    start(good)
    (OUT.parent / "a.txt").write_text("n=7")
    other = Path("results/models/trained/q/manifest.json")
    assert start(never, other, "{}", "--inputs", str(OUT)) == 1
    assert "a.txt: damaged" in capsys.readouterr().err
    assert not other.parent.exists()


def test_inputs_are_found_by_address_and_their_hashes_stand_in_the_manifest(start: Callable) -> None:
    start(good)

    def build(job: Job) -> None:
        assert job.input("models/base/p").facts == {"n": 1}
        with pytest.raises(UserError, match="not among this job's inputs: models/base/p"):
            job.input("models/base/q")

    other = Path("results/models/trained/q/manifest.json")
    assert start(build, other, "{}", "--inputs", str(OUT), "/outside/a.jsonl") == 0
    assert read(other).manifest["inputs"] == {"models/base/p": read(OUT).sha256}


def test_nothing_is_published_after_the_lease_is_lost(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def build(job: Job) -> None:
        (job.work / "lease").write_text(json.dumps({"token": "somebody else"}))

    assert start(build) == 1
    assert "another process took over" in capsys.readouterr().err
    assert not OUT.parent.exists()


def test_the_writer_holds_the_lease_while_it_builds(start: Callable) -> None:
    seen = {}

    def build(job: Job) -> None:
        seen.update(json.loads((job.work / "lease").read_text()))
        assert not Lease(job.work / "lease")._take()

    assert start(build) == 0
    assert seen["pid"] == os.getpid()


def test_minutes_and_the_key_of_resume_state_reach_the_build(start: Callable) -> None:
    seen = []
    assert start(lambda job: seen.append((job.minutes, job.key)), OUT, "{}", "--minutes", "7.5") == 0
    assert seen == [(7.5, digest("{}"))]  # no inputs: the spec alone
    assert step.Job is Job


def test_a_writer_that_lost_its_lease_leaves_the_draft_of_the_next_alone(start: Callable, capsys: pytest.CaptureFixture) -> None:
    theirs = draft_folder(OUT, "another token")

    def build(job: Job) -> None:
        (WORK / "lease").write_text(json.dumps({"host": "another host", "pid": 1, "token": "another token"}))
        theirs.mkdir(parents=True)
        (theirs / "half.txt").write_text("being written")

    assert start(build) == 1
    assert "took over" in capsys.readouterr().err
    assert (theirs / "half.txt").read_text() == "being written"
