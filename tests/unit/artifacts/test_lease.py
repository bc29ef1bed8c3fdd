"""One writer at a time: between processes, after a death, and with a fencing check."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfusion.artifacts import lease
from llmfusion.artifacts.lease import Lease
from llmfusion.errors import UserError

CRITICAL = """
import sys, time
from pathlib import Path
from llmfusion.artifacts import lease
lease.POLL_SECONDS = 0.01
folder = Path(sys.argv[1])
for _ in range(5):
    with lease.Lease(folder / "lease") as held:
        with open(folder / "log", "a") as log:
            log.write("in\\n"); log.flush()
            time.sleep(0.01)
            held.check()
            log.write("out\\n")
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)


def hold(path: Path, age: float = 0.0, **keys: object) -> None:
    """Put somebody's lease there, touched ``age`` seconds ago."""
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": lease._started(os.getpid()),
        "job": None,
        "token": "theirs",
    }
    path.write_text(json.dumps(mine | keys))
    os.utime(path, (time.time() - age,) * 2)


def is_free(path: Path) -> bool:
    """Whether the lease can be had, tried for a little while."""
    got = threading.Event()

    def take() -> None:
        with Lease(path):
            got.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    free = got.wait(0.3)
    path.unlink(missing_ok=True)  # lets a waiting thread go
    thread.join(5)
    return free


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_processes_never_hold_it_together(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", CRITICAL, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(3)
    ]
    assert [w.wait(60) for w in writers] == [0, 0, 0], [w.stderr.read() for w in writers if w.stderr]
    for writer in writers:
        writer.stderr.close()  # type: ignore[union-attr]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 15
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_living_holder_is_waited_for_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hold(tmp_path / "lease", age=10_000)  # old, but its process lives on this host
    assert not is_free(tmp_path / "lease")
    assert caplog.text.count(f"held by process {os.getpid()} on {socket.gethostname()}") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # shown where nobody has set logging up


def test_a_dead_holder_on_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    hold(tmp_path / "lease", pid=dead_pid())
    assert is_free(tmp_path / "lease")


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    hold(tmp_path / "lease", started="1")
    assert is_free(tmp_path / "lease")


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lease._started(process.pid)
    hold(tmp_path / "lease", pid=process.pid, started=started)
    alive = is_free(tmp_path / "lease")
    hold(tmp_path / "lease", pid=process.pid, started=started)
    process.stdin.close()  # type: ignore[union-attr]
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status yet
    assert (alive, is_free(tmp_path / "lease")) == (False, True)
    process.wait()


@pytest.mark.parametrize(
    ("age", "free"), [(0, False), (lease.STALE_SECONDS - 30, False), (lease.STALE_SECONDS + 1, True)]
)
def test_another_hosts_lease_is_stale_by_age_alone(tmp_path: Path, age: float, free: bool) -> None:
    hold(tmp_path / "lease", age=age, host="elsewhere", pid=dead_pid())
    assert is_free(tmp_path / "lease") is free


@pytest.mark.parametrize(
    ("age", "free"), [(0, False), (lease.STALE_SECONDS - 30, False), (lease.STALE_SECONDS + 1, True)]
)
def test_a_holder_in_another_container_of_the_same_host_name_is_stale_by_age_alone(
    tmp_path: Path, age: float, free: bool
) -> None:
    hold(tmp_path / "lease", age=age, pid=dead_pid(), processes="another kernel pid:[1]")
    assert is_free(tmp_path / "lease") is free


def test_a_lease_says_whose_processes_its_holder_is_among(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease"):
        written = json.loads((tmp_path / "lease").read_text())
    hold(tmp_path / "lease", **(written | {"pid": dead_pid()}))
    assert os.readlink("/proc/self/ns/pid") in written["processes"]
    assert is_free(tmp_path / "lease")


@pytest.mark.parametrize(("content", "age", "free"), [(b"", 0, False), (b"\0\0", 0, False), (b"", 1000, True)])
def test_an_unreadable_lease_is_stale_by_age_alone(tmp_path: Path, content: bytes, age: float, free: bool) -> None:
    (tmp_path / "lease").write_bytes(content)
    os.utime(tmp_path / "lease", (time.time() - age,) * 2)
    assert is_free(tmp_path / "lease") is free


@pytest.mark.parametrize("ahead", [60, 86_400, 10**9])
def test_a_lease_from_the_future_is_waited_for_and_neither_stolen_nor_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """Another host's clock goes ahead, or a hand set the time: who waits looks whether it changes."""
    path = tmp_path / "lease"
    hold(path, age=-ahead, host="elsewhere")
    assert not is_free(path)
    hold(path, age=-ahead, host="elsewhere")
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    assert is_free(path)


def test_a_living_writer_whose_clock_goes_ahead_keeps_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.2)
    path = tmp_path / "lease"
    hold(path, age=-1000, host="elsewhere")
    stop = threading.Event()

    def touch() -> None:
        ahead = 1000.0
        while not stop.wait(0.02):
            ahead += 0.02
            if path.exists():
                os.utime(path, (time.time() + ahead,) * 2)

    writer = threading.Thread(target=touch)
    writer.start()
    got = threading.Event()

    def take() -> None:
        with Lease(path):
            got.set()

    waiting = threading.Thread(target=take, daemon=True)
    waiting.start()
    assert not got.wait(1.0)  # five times as long as a dead one is waited for
    stop.set()
    writer.join()
    assert got.wait(5)
    waiting.join(5)


def test_the_age_of_a_lease_is_told_by_the_clock_that_stamps_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This host's clock goes an hour ahead of the file server's: that makes nobody's lease stale."""
    hold(tmp_path / "lease", host="elsewhere")
    now = time.time
    monkeypatch.setattr(lease.time, "time", lambda: now() + 3600)
    assert not is_free(tmp_path / "lease")


NO_LEASES = {
    "a folder": lambda path: (path / "deep").mkdir(parents=True),
    "a FIFO": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("/nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", NO_LEASES.values(), ids=NO_LEASES)
def test_what_is_no_lease_is_removed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "lease")
    with Lease(tmp_path / "lease") as held:
        held.check()
    assert list(tmp_path.iterdir()) == []
    assert "no lease; removed" in caplog.text


GARBAGE = [b"[]", b'"x"', b"[" * 100_000, b"9" * 10_000, b'{"host": 3, "pid": "x"}', b'{"token": null}', b"\xff"]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_waited_for_as_long_as_a_silent_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / "lease").write_bytes(content)
    assert not is_free(tmp_path / "lease")
    assert "held by a writer that cannot be read" in caplog.text or content.startswith(b'{"host"')
    (tmp_path / "lease").write_bytes(content)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.05)
    assert is_free(tmp_path / "lease")


@pytest.mark.parametrize("pid", [0, -1, 2**70, True])
def test_a_process_that_cannot_be_is_dead(tmp_path: Path, pid: int) -> None:
    hold(tmp_path / "lease", pid=pid, started=None)
    assert is_free(tmp_path / "lease")


def test_what_a_killed_writer_noted_reaches_the_one_that_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    for noted in ([1, 2, 3], None):
        hold(path, pid=dead_pid(), note=noted)
        with Lease(path, "own") as held:
            assert held.taken_over == {"note": noted}
            assert json.loads(path.read_text())["note"] == "own"
    with Lease(path) as held:
        assert held.taken_over is None


def test_whoever_lost_the_lease_finds_out_before_publishing(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with Lease(path) as held:
        held.check()
        hold(path)
        with pytest.raises(UserError, match="another process took over"):
            held.check()
        path.unlink()
        with pytest.raises(UserError, match="nothing was published"):
            held.check()


def test_leaving_does_not_remove_another_holders_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with Lease(path):
        hold(path)
    assert json.loads(path.read_text())["token"] == "theirs"


def test_it_is_released_also_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Lease(tmp_path / "deep/er/lease"):
        _ = 1 / 0
    assert list((tmp_path / "deep/er").iterdir()) == []


def test_a_held_lease_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TOUCH_SECONDS", 0.01)
    path = tmp_path / "lease"
    with Lease(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_a_take_over_that_moved_a_new_holders_lease_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    hold(path, token="new")
    Lease(path)._move_aside({"token": "old"})  # judged stale before the new holder came
    assert json.loads(path.read_text())["token"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]
