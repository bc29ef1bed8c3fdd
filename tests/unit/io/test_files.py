"""Only plain files inside a folder exist."""

import os
import socket
from pathlib import Path

import pytest

from llmfusion.errors import DamagedError
from llmfusion.io.files import plain_file, plain_files


def test_plain_files_are_named_relative_to_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    assert plain_files(tmp_path) == ["a/b.txt", "c.txt"]
    assert plain_file(tmp_path, "a/b.txt") == tmp_path / "a/b.txt"


def _symbolic_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def _fifo(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, secret: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _hard_link_of_another_owner(path: Path, secret: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file to somebody else")
    os.link(secret, path)
    os.chown(secret, 12345, -1)


@pytest.mark.parametrize("make", [_symbolic_link, _fifo, _socket, _hard_link_of_another_owner])
def test_whatever_is_no_plain_file_of_the_folder_is_refused(tmp_path: Path, make: object) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder / "chat_template.jinja", secret)  # type: ignore[operator]
    with pytest.raises(DamagedError, match=r"chat_template\.jinja"):
        plain_file(folder, "chat_template.jinja")
    with pytest.raises(DamagedError, match=r"chat_template\.jinja"):
        plain_files(folder)


def test_a_folder_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "inside").symlink_to(outside)
    with pytest.raises(DamagedError, match="inside"):
        plain_file(folder, "inside/x")
    with pytest.raises(DamagedError, match="inside"):
        plain_files(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "."])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedError):
        plain_file(tmp_path, name)
