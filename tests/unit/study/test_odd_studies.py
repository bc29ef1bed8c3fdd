"""Odd study files through ``llmfusion check``: exit status 2, file and line, no traceback, no waiting."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmfusion.cli.main import main
from tests.odd_studies import REFUSED, TEXT, VALID

SECONDS = 30  # until a check is taken to wait forever, on a machine that does other things
MEGABYTES = 300  # that a file of up to 100 MB may take beside what is loaded


@pytest.fixture(autouse=True)
def _in_bounded_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"the check did not end within {SECONDS} s", pytrace=False)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(folder: Path, content: str | bytes) -> Path:
    file = folder / "study.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(("content", "told"), REFUSED.values(), ids=REFUSED)
def test_an_odd_study_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, told: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["check", str(write(tmp_path, content))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert "study.yaml" in printed.err.splitlines()[0]
    assert all(len(line) < 1500 for line in printed.err.splitlines())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_a_study_may_be_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes) -> None:
    assert main(["check", str(write(tmp_path, content))]) == 0, capsys.readouterr().err


def test_what_is_no_file_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, told in (
        ("fifo.yaml", "is no regular file"),
        ("loop.yaml", "Too many levels of symbolic links"),
        (".", "Is a directory"),
        ("absent.yaml", "No such file"),
        ("study.yaml/x", "Not a directory"),
        ("a" * 300, "File name too long"),
    ):
        write(tmp_path, TEXT)
        assert main(["check", str(tmp_path / name)]) == 2, name
        assert told in capsys.readouterr().err


def test_a_device_is_no_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "/dev/zero"]) == 2
    assert "/dev/zero:1: is no regular file" in capsys.readouterr().err


def test_a_study_may_be_a_symbolic_link(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    (tmp_path / "link.yaml").symlink_to("study.yaml")
    assert main(["check", str(tmp_path / "link.yaml")]) == 0


def test_mistakes_of_all_sections_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT
    for old, new in (
        ("format: letter", "format: leter"),
        ("noisy-code: 450", "noisy-cod: 450"),
        ("lr: 8e-3", "lr: -1"),
        ("method: ta", "method: tax"),
        ("max_length: 128", "max_length: 128\n    english: 0.9"),
        ("directory: runs/mini", "directory: ~/runs"),
    ):
        text = text.replace(old, new, 1)
    assert main(["check", str(write(tmp_path, text))]) == 2
    assert "6 mistakes; nothing was started" in capsys.readouterr().err
