"""Logs of jobs: one process writes at a time, also where Snakemake removes the log of a job that works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import os, subprocess, sys, time
from pathlib import Path
from llmfusion.errors import UserError
from llmfusion.io import job_log
from llmfusion.io.logs import log_to_stdout
log = Path("logs/a.log")
"""


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + text], cwd=folder, env=os.environ, capture_output=True, text=True
    )


def test_children_and_c_libraries_write_to_the_log_too_and_nothing_else_lies_beside_it(tmp_path: Path) -> None:
    done = run(
        """
print("before")
with job_log.written_to(log):
    print("python")
    os.write(2, b"c library\\n")
    subprocess.run(["echo", "child"])
print("after")
""",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\n", "")
    assert sorted((tmp_path / "logs/a.log").read_text().split("\n")) == ["", "after", "c library", "child", "python"]
    assert os.listdir(tmp_path / "logs") == ["a.log"]


def test_a_log_that_is_removed_while_its_job_works_is_put_back_by_who_waits_and_at_the_end(tmp_path: Path) -> None:
    done = run(
        """
with job_log.written_to(log):
    print("first", flush=True)
    log.unlink()  # as Snakemake does when it starts a second job of the same artifact
    job_log.put_back(log)
    assert log.read_text() == "first\\n"
    log.unlink()
    print("second")
""",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "logs/a.log").read_text() == "first\nsecond\n"
    assert os.listdir(tmp_path / "logs") == ["a.log"]


def test_who_adopts_writes_behind_what_the_other_one_wrote(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.log").write_text("of the one that worked\n")
    run('with job_log.written_to(log):\n    print("adopted")', tmp_path)
    assert (tmp_path / "logs/a.log").read_text() == "of the one that worked\nadopted\n"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ('Path("logs/a.log").mkdir(parents=True)', "Is a directory"),
        ('Path("logs").write_text("")', "File exists"),
        ('Path("logs").mkdir(); os.symlink("elsewhere", log)', "Too many levels of symbolic links"),
    ],
)
def test_a_log_that_cannot_be_written_is_an_error_in_one_sentence(tmp_path: Path, make: str, reason: str) -> None:
    text = f"""
{make}
try:
    with job_log.written_to(log):
        raise AssertionError("went on")
except UserError as error:
    print(error)
"""
    done = run(text, tmp_path)
    assert done.stdout == f"logs/a.log: the log of this job cannot be written: {reason}; nothing was made\n", done


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
@pytest.mark.parametrize("say", ['logging.getLogger("llmfusion").info("lost?")', 'print("lost?", flush=True)'])
def test_a_line_that_the_disk_does_not_take_fails_the_job(tmp_path: Path, say: str) -> None:
    text = f"""
import logging
log_to_stdout()
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
try:
    {say}
except OSError as error:
    sys.stderr.write(os.strerror(error.errno))
    os._exit(3)
os._exit(0)
"""
    done = run(text, tmp_path)
    assert (done.returncode, done.stderr) == (3, "No space left on device")
