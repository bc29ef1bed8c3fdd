"""The process that forks, where two things happen at once; what it does for whole steps is tested end to end."""

import json
import os
import socket
import sys
from types import SimpleNamespace

import pytest

from llmfusion.cli import warm
from llmfusion.cli.warm import Server


@pytest.fixture
def server(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        yield Server(listening)


def running(server):
    """A fork that has already ended, as the server knows it, and the end of who asked for it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    ended = os.pidfd_open(pid)
    server.running[pid] = ended, ours
    server.selector.register(ended, 1, None)
    server.selector.register(ours, 1, None)
    while not server.selector.select(5):
        pass
    return pid, theirs


def test_who_asked_may_go_in_the_moment_the_fork_ends(server):
    pid, theirs = running(server)
    theirs.close()
    server._ended(pid)
    server._gone(pid)  # its event was in the same batch
    assert not server.running
    pid, theirs = running(server)
    theirs.close()
    server._gone(pid)
    server._ended(pid)
    assert not server.running


def test_the_status_is_told_as_wait_gives_it(server):
    pid, theirs = running(server)
    server._ended(pid)
    assert os.waitstatus_to_exitcode(json.loads(theirs.recv(100))["status"]) == 3
    theirs.close()


def test_who_is_ended_while_it_asks_leaves_nothing_open(server, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(tmp_path / "socket"))
        socket.send_fds(asking, [(100).to_bytes(8, "big")], [0, 1, 2])
        asking.sendall(b"{")
    server._accept()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not server.running


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_fork_publishes_to_nobody_whom_the_asking_process_would_not_let_read(server, tmp_path, monkeypatch, umask):
    """The step's shell, or a site's job script, may set another umask than the one of ``llmfusion warm``."""
    asked = []
    monkeypatch.setenv(warm.ADDRESS, str(tmp_path / "socket"))
    monkeypatch.setattr(warm, "_send", lambda connection, request, files: asked.append(request))
    monkeypatch.setattr(warm, "_receive", lambda connection: {})
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=lambda number: None))
    before = os.umask(umask)
    with pytest.raises(KeyError, match="pid"):
        warm.ask(["step"])
    os.umask(before)
    pid = os.fork()
    if pid == 0:
        server._take_over(asked[0], [], socket.socket())
        os._exit(os.umask(0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == umask
