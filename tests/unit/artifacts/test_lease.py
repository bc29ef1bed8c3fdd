"""One writer at a time: between processes, after a death, and with a fencing check."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
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


@pytest.mark.parametrize(("content", "age", "free"), [(b"", 0, False), (b"\0\0", 0, False), (b"", 1000, True)])
def test_an_unreadable_lease_is_stale_by_age_alone(tmp_path: Path, content: bytes, age: float, free: bool) -> None:
    (tmp_path / "lease").write_bytes(content)
    os.utime(tmp_path / "lease", (time.time() - age,) * 2)
    assert is_free(tmp_path / "lease") is free


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
