"""Resume state: files that a job finishes one by one in ``work/``, so that the next start goes on from them.

Each file has a note beside it, written last: the key of the work it belongs to (one spec over the very content of its
inputs), the file's name, size and sha256, what the job wants to remember, and the note's own sha256. A file without
its note, of another key, under another name or of other bytes does not count.
"""

import logging
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError
from llmfusion.io.digests import canonical, digest
from llmfusion.io.files import default_rights, json_object_or_empty, replacing, sha256_file, write_file

logger = logging.getLogger(__name__)


def note_path(path: Path) -> Path:
    """The note of a file."""
    return path.with_suffix(".json")


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write the note of a file, with its name and size and the note's own sha256."""
    size = {} if note["sha256"] is None else {"size": path.stat().st_size}
    note = {"name": path.name, **size, **note}
    write_file(note_path(path), canonical({**note, "note_sha256": _sha256_of_note(note)}).encode())


def _sha256_of_note(note: dict[str, Any]) -> str | None:
    """What a note of this content carries as its own sha256; None where no note is written with it."""
    try:
        return digest(canonical(note))
    except (ValueError, RecursionError):
        return None


def _is_plain(path: Path) -> bool:
    """Whether there is a regular file, not a link to one: reading it cannot wait."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _sha256_or_none(path: Path) -> str | None:
    try:
        return sha256_file(path, follow_links=False)
    except (OSError, DamagedError):
        return None


def _unlink(path: Path) -> None:
    """Remove whatever has a name, a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class ResumeFolder:
    """Finished files in a folder, each with its note; those of another spec or other inputs (``key``) do not count."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key
        folder.mkdir(parents=True, exist_ok=True)
        # of new files, whatever a library gives them; who may enter the folder is the job's to say
        self._mode = default_rights() & 0o666

    def remove_temporary(self) -> None:
        """Remove what killed writers left half-written; for the one process that writes, or before others begin."""
        for path in self.folder.glob(".*.tmp"):
            _unlink(path)

    def remove_others(self) -> None:
        """Remove what does not belong here: files that were not finished, or of another spec or other inputs."""
        others = sorted(set(self.folder.iterdir()) - set(self._own()))
        if others:
            names = ", ".join(path.name for path in others[:3]) + (f" and {len(others) - 3} more" * (len(others) > 3))
            logger.info("%s: not finished, or of another spec or other inputs, and removed: %s", self.folder, names)
        for path in reversed(others):  # a file, then its note
            _unlink(path)

    def note(self, name: str) -> dict[str, Any]:
        """What was noted of a file; empty where there is no note, not a whole one, or that of another file."""
        path = note_path(self.folder / name)
        note = json_object_or_empty(path) if _is_plain(path) else {}
        own = note.pop("note_sha256", None)
        of = str(note.get("name"))
        return note if name in (of, note_path(Path(of)).name) and own == _sha256_of_note(note) else {}

    def is_ours(self, name: str) -> bool:
        """Whether a file's note carries this folder's key."""
        return self.note(name).get("key") == self.key

    def is_whole(self, name: str) -> bool:
        """Whether a file was finished, and its bytes are still those that were written, whatever its key."""
        note = self.note(name)
        if "sha256" not in note:
            return False
        path = self.folder / name
        if note["sha256"] is None:
            return True
        # the size first: what was grown to terabytes is not hashed
        return _is_plain(path) and path.stat().st_size == note.get("size") and _sha256_or_none(path) == note["sha256"]

    def has(self, name: str) -> bool:
        """Whether a file was finished for this key and its bytes are as they were written. A damaged one is removed."""
        if not self.is_ours(name):
            return False
        if self.is_whole(name):
            return True
        logger.info("%s is missing or damaged; it is made again", self.folder / name)
        self.remove(name)
        return False

    def put(self, name: str, write: Callable[[Path], str | None] | None, note: dict[str, Any]) -> None:
        """Write a file with ``write(path)``, then its note; without ``write`` only the note.

        ``write`` may return the sha256 of what it wrote, so that the file need not be read once more.
        """
        path = self.folder / name
        sha256 = None
        if write is not None:
            with replacing(path) as temporary:
                sha256 = write(temporary) or sha256_file(temporary)
                temporary.chmod(self._mode)
        write_note(path, {"key": self.key, "sha256": sha256, **note})

    def remove(self, name: str) -> None:
        """Remove a file, its note first: without it the file does not count."""
        for path in (note_path(self.folder / name), self.folder / name):
            _unlink(path)

    def size(self) -> int:
        """Bytes of what is there and counts."""
        return sum(path.lstat().st_size for path in self._own())

    def _own(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if self.is_ours(path.name)]
