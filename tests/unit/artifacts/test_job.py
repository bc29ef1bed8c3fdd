"""A job as a rule starts it (``llmfusion step``): in this process, in an empty directory."""

import errno
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmfusion.artifacts import lease
from llmfusion.artifacts.job import Job
from llmfusion.artifacts.lease import Lease
from llmfusion.artifacts.store import Draft, draft_folder, publish, read
from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.io.digests import digest

OUT = Path("results/models/base/p/manifest.json")
WORK = Path("work/models/base/p")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def start(build: Callable[[Job], None], out: Path = OUT, spec: str = '{"n":1}', *more: str) -> int:
        monkeypatch.setattr("llmfusion.steps.score.build", build)
        monkeypatch.setattr(sys, "argv", ["llmfusion", "step", "score", "--spec", spec, "--out", str(out), *more])
        return main()

    return start


def good(job: Job) -> None:
    number = json.loads(job.spec)["n"]
    (job.folder / "a.txt").write_text(f"n={number}")
    job.facts["n"] = number


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


def test_an_artifact_is_made_with_its_facts_and_the_command_in_the_log(
    start: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(good) == 0
    found = read(OUT)
    assert (found.facts, found.file("a.txt").read_text()) == ({"n": 1}, "n=1")
    assert capsys.readouterr().out.startswith(
        "# python -m llmfusion step score --spec '{\"n\":1}' --out results/models/base/p/manifest.json\n"
    )


def test_what_a_job_measured_stands_in_its_provenance_and_changes_no_manifest(start: Callable) -> None:
    def measuring(speed: float) -> Callable[[Job], None]:
        def build(job: Job) -> None:
            good(job)
            job.measured["speed"] = speed

        return build

    manifests = []
    for name, speed in (("a", 1.5), ("b", 2.5)):
        out = Path(f"{name}/results/models/base/p/manifest.json")
        assert start(measuring(speed), out) == 0
        assert json.loads(out.with_name("provenance.json").read_text())["speed"] == speed
        manifests.append(out.read_bytes())
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("there", [False, True], ids=["first", "replaced"])
def test_what_was_finished_while_the_job_waited_is_adopted_unchanged(
    start: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Another writer of the same artifact holds the lease and publishes; also where an older one is being replaced."""
    if there:
        start(good)
    other = Lease(WORK / "lease")
    other.__enter__()

    def publish_and_release(_: float) -> None:
        if other is not None and not published:
            made = Draft("models/base/p", '{"n":1}', {}, draft_folder(OUT, other.token), {"n": 1})
            made.folder.mkdir(parents=True)
            (made.folder / "a.txt").write_text("n=1")
            publish(made, OUT, {})
            published.append(OUT.stat().st_ino)
            other.__exit__()

    published: list[int] = []
    monkeypatch.setattr(lease.time, "sleep", publish_and_release)
    assert start(never) == 0
    assert [OUT.stat().st_ino] == published
    assert "adopted" in capsys.readouterr().out


def test_what_was_there_when_the_job_began_is_made_again(start: Callable) -> None:
    """Snakemake's -f leaves the old artifact in place, and a job that fails does not lose it."""
    start(good)
    before = OUT.stat().st_ino
    assert start(failing(UserError("no"))) == 1
    assert OUT.stat().st_ino == before
    assert start(good) == 0
    assert OUT.stat().st_ino != before
    assert read(OUT).facts == {"n": 1}


def test_another_spec_or_damage_is_made_again(start: Callable) -> None:
    start(good)
    assert start(good, OUT, '{"n":2}') == 0
    assert read(OUT).facts == {"n": 2}
    (OUT.parent / "a.txt").write_text("n=3")
    assert start(good, OUT, '{"n":2}') == 0
    assert read(OUT).file("a.txt").read_text() == "n=2"


def test_a_users_mistake_is_one_line_and_leaves_only_resume_state(
    start: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
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
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0: "
            "file write failed"
        ),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_is_reported_with_what_is_free(
    start: Callable, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert start(failing(error)) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: the disk is full while making {OUT}: ")
    assert "iB are free in" in message
    assert "Traceback" not in message
    assert nothing_half_visible()


def test_a_disk_that_fills_while_publishing_leaves_the_old_artifact(
    start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(good)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmfusion.artifacts.store.write_file", full)
    assert start(good, OUT, '{"n":2}') == 1
    assert read(OUT).facts == {"n": 1}
    assert not drafts()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ValueError("a defect"), KeyError("x")])
def test_a_defect_keeps_its_traceback_but_leaves_nothing(
    start: Callable, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(failing(error)) == 1
    assert "Traceback (most recent call last)" in (message := capsys.readouterr().err)
    assert type(error).__name__ in message
    assert nothing_half_visible()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_a_step_without_a_traceback_and_leaves_nothing_also_if_it_comes_twice(
    start: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def build(job: Job) -> None:
        (job.folder / "half").write_text("")
        os.kill(os.getpid(), number)

    rmtree = shutil.rmtree

    def interrupted(*arguments: object, **given: object) -> None:
        os.kill(os.getpid(), number)
        rmtree(*arguments, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(SystemExit) as caught:
        start(build)
    assert caught.value.code == 128 + number
    assert nothing_half_visible()
    assert capsys.readouterr().err == ""


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
    assert start(lambda job: seen.append((job.time_limit_minutes, job.key)), OUT, "{}", "--minutes", "7.5") == 0
    assert seen == [(7.5, digest("{}"))]  # no inputs: the spec alone


def test_a_writer_that_lost_its_lease_leaves_the_draft_of_the_next_alone(
    start: Callable, capsys: pytest.CaptureFixture
) -> None:
    theirs = draft_folder(OUT, "another token")

    def build(job: Job) -> None:
        (WORK / "lease").write_text(json.dumps({"host": "another host", "pid": 1, "token": "another token"}))
        theirs.mkdir(parents=True)
        (theirs / "half.txt").write_text("being written")

    assert start(build) == 1
    assert "took over" in capsys.readouterr().err
    assert (theirs / "half.txt").read_text() == "being written"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free, in bytes, in results/ and in work/."""
    left = {"results": 0, "work": 0}

    def usage(place: Path) -> SimpleNamespace:
        return SimpleNamespace(
            free=left["work" if place.absolute().is_relative_to(Path("work").absolute()) else "results"]
        )

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return left


def needing(result: int, resume: int = 0) -> Callable[[Job], None]:
    def build(job: Job) -> None:
        job.require_disk("a model", result, resume)
        good(job)

    return build


def test_a_job_without_room_is_refused_before_it_works_with_what_it_needs_and_what_is_free(
    start: Callable, capsys: pytest.CaptureFixture[str], free: dict[str, int]
) -> None:
    free.update(results=56 * 2**20, work=56 * 2**20)
    assert start(needing(1234 * 2**20)) == 1
    message = capsys.readouterr().err
    place = OUT.parent.parent.resolve()
    advice = "free some, or move the study's `directory`. Nothing was made"
    assert message == f"error: a model needs 1,234 MiB, 56 MiB are free in {place}: {advice}\n"
    assert nothing_half_visible()


@pytest.mark.parametrize(
    ("result", "resume", "refused"),
    [(100, 0, False), (101, 0, True), (60, 40, False), (60, 41, True), (0, 100, False), (0, 101, True)],
)
def test_result_and_resume_state_share_a_disk(
    start: Callable, free: dict[str, int], result: int, resume: int, refused: bool
) -> None:
    free.update(results=100, work=100)
    assert start(needing(result, resume)) == refused


def test_on_two_disks_each_must_hold_its_own(
    start: Callable, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def another(path: Path, **given: bool) -> object:
        found = stat(path, **given)
        return SimpleNamespace(st_dev=-1, st_mode=found.st_mode) if path.name == "p" and "work" in path.parts else found

    free.update(results=100, work=50)
    monkeypatch.setattr(Path, "stat", another)
    assert start(needing(100, 50)) == 0
    shutil.rmtree("results")
    assert start(needing(100, 51)) == 1


def test_a_disk_that_fills_all_the_same_is_reported_with_what_was_needed(
    start: Callable, capsys: pytest.CaptureFixture[str], free: dict[str, int]
) -> None:
    free.update(results=20 * 2**20, work=20 * 2**20)

    def build(job: Job) -> None:
        job.require_disk("a model", 15 * 2**20)
        free.update(results=3 * 2**20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert start(build) == 1
    free_now = f"3,072 KiB are free in {Path.cwd()}; free some and run again"
    message = f"error: the disk is full while making {OUT}: a model needs 15 MiB; {free_now}\n"
    assert capsys.readouterr().err == message


def test_a_log_that_cannot_be_written_is_a_failure(
    start: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115 - closing it would fail, too
        assert start(never) == 1
    assert "the disk is full while making" in capsys.readouterr().err
    assert nothing_half_visible()


def test_drafts_of_a_name_that_goes_on_behind_a_dot_are_another_writers(start: Callable) -> None:
    theirs = draft_folder(Path("results/models/base/p.5/manifest.json"), "0123456789ab")
    theirs.mkdir(parents=True)
    (theirs / "half.txt").write_text("being written")
    assert start(good) == 0
    assert (theirs / "half.txt").exists()


def test_what_a_writer_killed_after_publishing_left_goes_with_the_next_reader_or_writer(start: Callable) -> None:
    assert start(good) == 0
    other = Path("results/models/trained/q/manifest.json")
    for build, out, inputs in ((never, OUT, ()), (good, other, ("--inputs", str(OUT)))):
        (WORK / "state").mkdir()
        (WORK / "state/step-00000007.safetensors").write_text("moments")
        (OUT.parent.with_name(f".{OUT.parent.name}.0123456789ab.draft.old")).mkdir()
        (WORK / "lease").write_text(
            json.dumps(
                {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1", "token": "killed", "note": None}
            )
        )
        assert start(build, out, '{"n":1}', *inputs) == 0
        assert list(WORK.iterdir()) == []
        assert not drafts()


def test_a_score_killed_while_it_was_written_leaves_no_half_of_it(start: Callable) -> None:
    score = Path("results/scores/base/p/mmlu.json")
    score.parent.mkdir(parents=True)
    for name in (".mmlu.json.77.tmp", ".mmlu.provenance.json.77.tmp"):
        (score.parent / name).write_text("{")
    (score.parent / ".mmlu.json.notes").write_text("not ours")
    assert start(lambda job: job.facts.update(score=1.0), score) == 0
    assert sorted(p.name for p in score.parent.iterdir()) == [".mmlu.json.notes", "mmlu.json", "mmlu.provenance.json"]


def test_a_spec_of_another_step_is_refused_in_one_message(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    from llmfusion.study.kinds.score import Spec

    assert start(lambda job: job.parse(Spec) and None, OUT, '{"step":"merge"}') == 1
    message = capsys.readouterr().err
    assert message.startswith("error: --spec is not a spec of this step: ")
    assert "Traceback" not in message
    assert nothing_half_visible()


def test_another_process_builds_the_same_job_without_hashing_its_inputs_again(
    start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(good)

    def build(job: Job) -> None:
        job.mark_started()
        (OUT.parent / "a.txt").write_text("changed after it was verified")
        other = Job.from_json(json.loads(json.dumps(job.to_json())))
        inputs = {address: artifact.manifest for address, artifact in job.inputs.items()}
        assert {address: artifact.manifest for address, artifact in other.inputs.items()} == inputs
        assert other.input("models/base/p").sha256 == job.input("models/base/p").sha256
        for name in ("spec", "folder", "work", "facts", "key", "time_limit_minutes", "began", "start_seconds"):
            assert getattr(other, name) == getattr(job, name)

    assert start(build, Path("results/models/trained/q/manifest.json"), "{}", "--inputs", str(OUT)) == 0
