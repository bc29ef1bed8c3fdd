"""Only plain files inside a folder exist."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmfusion.errors import DamagedError
from llmfusion.io.files import common_rights, copy_file, model_file, plain_file, plain_files, read_json_object


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


@pytest.mark.parametrize("make", [_symbolic_link, _fifo, _socket])
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


def test_a_hard_link_to_a_file_of_another_owner_than_the_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    folder = tmp_path / "model"
    folder.mkdir()
    os.link(secret, folder / "chat_template.jinja")
    assert plain_files(folder) == ["chat_template.jinja"]  # of one owner: as a shared cache has it
    stat = Path.stat
    owner = SimpleNamespace(st_uid=os.geteuid() + 1)  # only root could give the file away
    monkeypatch.setattr(Path, "stat", lambda path, **options: owner if path == folder else stat(path, **options))
    with pytest.raises(DamagedError, match=r"chat_template\.jinja: is a hard link to a file of another owner"):
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


def test_a_snapshot_of_the_hub_may_link_to_the_blobs_of_its_own_repository_alone(tmp_path):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "r"
    blobs = tmp_path / "models--o--n" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "models--o--other" / "blobs"):
        folder.mkdir(parents=True)
    for place in (blobs / "a", tmp_path / "models--o--other" / "blobs" / "a", tmp_path / "secret"):
        place.write_text("x")
    (snapshot / "good").symlink_to("../../blobs/a")
    assert model_file(snapshot, "good").read_text() == "x"
    for number, target in enumerate(("../../../models--o--other/blobs/a", tmp_path / "secret", "../../blobs")):
        (snapshot / f"bad{number}").symlink_to(target)
        with pytest.raises(DamagedError, match=rf"bad{number}: is a symbolic link that does not lead to"):
            model_file(snapshot, f"bad{number}")
    elsewhere = tmp_path / "own" / "snapshots" / "r"
    elsewhere.mkdir(parents=True)
    (elsewhere / "good").symlink_to(blobs / "a")
    with pytest.raises(DamagedError, match="is a symbolic link, expected a plain file"):
        model_file(elsewhere, "good")


def test_json_with_a_key_twice_or_nested_without_end_or_too_large_is_refused(tmp_path):
    file = tmp_path / "a.json"
    for text, message in (('{"a": 1, "a": 2}', "'a' is there twice"), ("[" * 10**5, "nested too deeply")):
        file.write_text(text)
        with pytest.raises(DamagedError, match=message):
            read_json_object(file)
    file.write_text('{"a": 1}')
    with pytest.raises(DamagedError, match="has 0 KiB, expected at most 0 KiB"):
        read_json_object(file, limit=3)
    assert read_json_object(file) == {"a": 1}


def test_a_copy_has_the_rights_of_its_source_and_a_merge_those_common_to_all(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").chmod(0o640)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    (tmp_path / "b").chmod(0o604)
    assert common_rights([tmp_path / "a", tmp_path / "b"]) == 0o600
