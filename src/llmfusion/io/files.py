"""Files that are there whole or not at all, second names for files, and JSON files that hold an object."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from llmfusion.errors import DamagedError

# errors of os.link that mean "copy instead": another file system, one without hard links, too many links, a file of
# another user
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
JSON_LIMIT = 100 * 2**20  # bytes; the largest tokenizers of models have a third of it
SETTINGS_LIMIT = 16 * 2**20  # bytes of a config.json and the like
FILE_TYPES = (
    (stat.S_ISLNK, "symbolic link"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISREG, "file"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISBLK, "block device"),
    (stat.S_ISCHR, "character device"),
)


def sha256_file(path: Path, follow_links: bool = True) -> str:
    """sha256 of a file's bytes, hex. Errors as in :func:`open_regular`."""
    with open_regular(path, follow_links) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_regular(path: Path, follow_links: bool = True) -> Iterator[BufferedReader]:
    """A regular file, open for reading; never waits, as opening a FIFO would.

    Raises :class:`DamagedError` for anything else (and for a symbolic link unless ``follow_links``), ``OSError`` where
    it cannot be opened.
    """
    handle = -1
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW))
        mode = os.fstat(handle).st_mode
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise
        mode = path.lstat().st_mode
    if handle < 0 or not stat.S_ISREG(mode):
        if handle >= 0:
            os.close(handle)
        raise DamagedError(f"{path}: is a {file_type(mode)}, expected a plain file")
    with open(handle, "rb") as file:
        yield file


def read_regular(path: Path, follow_links: bool = False, limit: int | None = None) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Errors as in :func:`open_regular`, and :class:`DamagedError` for a larger file.
    """
    with open_regular(path, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            sizes = f"has {format_bytes(size)}, expected at most {format_bytes(limit)}"
            raise DamagedError(f"{path}: {sizes}: it is not what its name says")
        return file.read(-1 if limit is None else limit)


def file_type(mode: int) -> str:
    """What a file is, for a message, from its ``st_mode``: ``FIFO``, ``folder``, ..."""
    return next((name for test, name in FILE_TYPES if test(mode)), "something else")


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on success it is synced and renamed to ``path``, else removed.

    Half a file on a full disk would keep it full, so the temporary file never stays. A killed process leaves
    ``.NAME.PID.tmp``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file so that it is there whole or not at all, with the permission bits ``mode`` from the beginning."""
    with replacing(path) as temporary:
        if mode is not None:
            temporary.touch(mode & 0o600)
            temporary.chmod(mode)
        temporary.write_bytes(content)


def default_rights() -> int:
    """Permission bits that a new folder gets here, by the process's umask."""
    mask = os.umask(0o077)  # tighter for the moment, so that another thread's new file is never too open
    os.umask(mask)
    return 0o777 & ~mask


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name (a hard link), or copy it: between file systems, on one without hard links, and where
    it has another owner than the target's folder (:func:`plain_file` would refuse the link).

    A copy has the source's rights, and at no time more.
    """
    try:
        if source.stat().st_uid != target.parent.stat().st_uid:
            raise PermissionError(errno.EPERM, "a file of another user")
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and its rights (no setuid bits); nobody can read more of the copy meanwhile."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy, 2**20)
        os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(original.fileno()).st_mode) & 0o777 | 0o200)


def common_rights(files: Iterable[Path]) -> int:
    """The bits of read, write and execute that all ``files`` grant: what is made from them is given no more."""
    rights = 0o777
    for file in files:
        rights &= stat.S_IMODE(file.stat().st_mode)
    return rights


def plain_file(folder: Path, name: str) -> Path:
    """The path of a file of ``folder``, whose content nobody outside the folder decides.

    Raises :class:`DamagedError` where ``name`` leads out of the folder or passes a symbolic link, and where it is no
    regular file (a FIFO, a device, a socket, a folder, nothing at all) or a hard link to a file of another owner than
    the folder's: such a file was never the folder's own to share.
    """
    path = folder / name
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise DamagedError(f"{path}: leads out of {folder}; only files inside the folder are read")
    for depth in range(1, len(parts)):
        _require_mode(folder.joinpath(*parts[:depth]), stat.S_ISDIR, "folder", folder)
    found = _require_mode(path, stat.S_ISREG, "plain file", folder)
    if found.st_nlink > 1 and found.st_uid != folder.stat().st_uid:
        raise DamagedError(f"{path}: is a hard link to a file of another owner than {folder}; copy the file instead")
    return path


def plain_files(folder: Path) -> list[str]:
    """Names of all files under ``folder``, relative and sorted; each one as :func:`plain_file` accepts it."""
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        for name in folders:
            _require_mode(Path(parent) / name, stat.S_ISDIR, "folder", folder)
        names += [str(relative / name) for name in files]
    return sorted(str(plain_file(folder, name).relative_to(folder)) for name in names)


def model_file(folder: Path, name: str) -> Path:
    """The path of a file of a model's folder: a plain file, or a link of a snapshot in the Hugging Face hub's cache.

    There ``models--OWNER--NAME/snapshots/REVISION`` holds links to ``models--OWNER--NAME/blobs``; a link is followed
    if it leads to a plain file in the ``blobs`` of its own repository. Raises :class:`DamagedError` for every other
    link, without a word of what it leads to, and for what :func:`plain_file` refuses.
    """
    path = folder / name
    root = folder.resolve()
    is_snapshot = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    if not (is_snapshot and path.is_symlink() and ".." not in Path(name).parts):
        return plain_file(folder, name)
    for depth in range(1, len(Path(name).parts)):
        _require_mode(folder.joinpath(*Path(name).parts[:depth]), stat.S_ISDIR, "folder", folder)
    blobs = root.parent.parent / "blobs"
    target = Path(os.path.normpath((root / name).parent / os.readlink(path)))
    if target.parent != blobs or blobs.is_symlink():
        raise DamagedError(f"{path}: is a symbolic link that does not lead to {blobs}; put the file itself there")
    plain_file(blobs, target.name)
    return path


def _require_mode(path: Path, is_wanted: Callable[[int], bool], wanted: str, folder: Path) -> os.stat_result:
    """The state of ``path`` itself, not of what it links to. Raises :class:`DamagedError` for another type of file."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path}: is missing: expected a {wanted} inside {folder}") from None
    except (OSError, ValueError) as error:  # no right to look, a name that is too long or holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise DamagedError(f"{path}: cannot be read: {reason}: expected a {wanted} inside {folder}") from None
    if not is_wanted(found.st_mode):
        kind = file_type(found.st_mode)
        raise DamagedError(f"{path}: is a {kind}, expected a {wanted}: only plain files inside {folder} are read")
    return found


def format_bytes(size: float) -> str:
    """A number of bytes for a message: ``3 KiB``, ``12 MiB``, ``40 GiB``."""
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.0f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON file that holds an object, at most ``limit`` bytes of it.

    Raises :class:`DamagedError` for a file that is no JSON or holds something else, ``OSError`` where it cannot be
    read.
    """
    content = parse_json(read_regular(path, follow_links=True, limit=limit), str(path))
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parse_json(text: bytes, place: str) -> Any:
    """JSON in which no object has a key twice: readers differ in which one counts.

    Raises :class:`DamagedError`, which names ``place``, also for JSON that is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates)
    except ValueError as error:
        raise DamagedError(f"{place}: expected JSON: {error}") from None
    except RecursionError:
        raise DamagedError(f"{place}: expected JSON: it is nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return content


def json_object_or_empty(path: Path) -> dict[str, Any]:
    """As :func:`read_json_object`, but ``{}`` where the file is absent or damaged: for notes that can be rewritten."""
    try:
        return read_json_object(path)
    except (OSError, DamagedError):
        return {}
