"""What can have happened to files between two jobs: each way, applied to one file or to a whole artifact.

A damage is called with a file, returns nothing, and leaves whatever a crash, a careless hand or an attacker would. The
ones that write an honest sha256 over a false content are :data:`FORGERIES`.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmfusion.io.digests import canonical

Damage = Callable[[Path], object]
Edit = Callable[[dict[str, Any]], object]  # of a manifest, in place
DEEP = b"[" * 100_000 + b"]" * 100_000


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes, under the file's old times."""

    def damage(path: Path) -> None:
        before = path.stat()
        path.write_bytes(change(path.read_bytes()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def flipped(at: float, bit: int = 0) -> Damage:
    """One bit another, at a share of the file's length."""

    def change(content: bytes) -> bytes:
        place = min(int(at * len(content)), len(content) - 1)
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]

    return rewritten(change)


def zero_tail(content: bytes) -> bytes:
    """A hole at the end, as a crash leaves it behind."""
    return content[: len(content) * 3 // 4] + b"\0" * (len(content) - len(content) * 3 // 4)


def folder_instead(path: Path) -> None:
    """A folder in the file's place."""
    path.unlink()
    path.mkdir()


def fifo_instead(path: Path) -> None:
    """A FIFO in the file's place: whoever opens it waits."""
    path.unlink()
    os.mkfifo(path)


def socket_instead(path: Path) -> None:
    """A socket in the file's place."""
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def link_to_copy(path: Path) -> None:
    """A symbolic link to the very same bytes outside the folder."""
    other = Path.cwd() / f"outside-{path.name}"
    other.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(other)


def dangling_link(path: Path) -> None:
    """A symbolic link to nothing."""
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def link_to_itself(path: Path) -> None:
    """A symbolic link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def foreign_hard_link(path: Path) -> None:
    """A second name of a file of another user."""
    other = path.with_name(f".nfs-{path.name}")
    os.link(path, other)
    os.chown(path, 12345, 12345)


OF_A_FILE: dict[str, Damage] = {  # each one is refused, for a manifest as for any other file
    **{f"a bit flipped at {at}": flipped(at, bit) for at, bit in ((0.0, 0), (0.3, 5), (0.6, 2), (0.999, 7))},
    "a tail of zeros": rewritten(zero_tail),
    "one byte short": rewritten(lambda content: content[:-1]),
    "half": rewritten(lambda content: content[: len(content) // 2]),
    "empty": rewritten(lambda content: b""),
    "one byte more": rewritten(lambda content: content + b"\n"),
    "a byte order mark": rewritten(lambda content: b"\xef\xbb\xbf" + content),
    "twice": rewritten(lambda content: content + content),
    "no text": rewritten(lambda content: b"\xff\xfe" * 40),
    "deep JSON": rewritten(lambda content: DEEP),
    "a long number": rewritten(lambda content: b"9" * 10_000),
    "grown to gigabytes of zeros": lambda path: os.truncate(path, 2**33),  # to be noticed by the size
    "gone": lambda path: path.unlink(),
    "a folder": folder_instead,
    "a FIFO": fifo_instead,
    "a socket": socket_instead,
    "a symbolic link to the same bytes": link_to_copy,
    "a dangling link": dangling_link,
    "a link to itself": link_to_itself,
    "a hard link to a file of another user": foreign_hard_link,
}
assert len(OF_A_FILE) == 23


def edited(change: Edit, honest: bool = True) -> Damage:
    """A changed manifest, written as manifests are; with ``honest`` it carries the sha256 of what it now holds."""

    def damage(path: Path) -> None:
        body = json.loads(path.read_bytes())
        old = body.pop("sha256")
        change(body)
        own = hashlib.sha256(canonical(body).encode()).hexdigest() if honest else old
        path.write_text(json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n")

    return damage


def first_file(**changed: Any) -> Edit:
    """Other values for the first file that a manifest lists."""
    return lambda body: next(iter(body["files"].values())).update(changed)


def listing(name: str) -> Edit:
    """One file more is listed, with the hash of what is there."""
    return lambda body: body["files"].update({name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}})


OF_A_MANIFEST: dict[str, Damage] = {
    "another key order": rewritten(lambda c: json.dumps(dict(reversed(json.loads(c).items())), indent=1).encode()),
    "no indent": rewritten(lambda c: json.dumps(json.loads(c), sort_keys=True).encode()),
    "a key twice": rewritten(lambda c: c.replace(b'{\n "address"', b'{\n "address": "x",\n "address"', 1)),
    "NaN": rewritten(lambda c: c.replace(b'"facts": {', b'"facts": {\n  "a": NaN,', 1)),
    "a list": rewritten(lambda c: b"[]"),
    "a text": rewritten(lambda c: b'"x"'),
    "an edited fact": edited(lambda body: body["facts"].update(license="mine"), honest=False),
    "an edited spec": edited(lambda body: body.update(spec='{"n":9}'), honest=False),
    "another input": edited(lambda body: body["inputs"].update(x="0" * 64), honest=False),
}
FORGERIES: dict[str, Damage] = {  # of a manifest, with an honest sha256 over it
    "another address": edited(lambda body: body.update(address="models/base/other")),
    "an address that is a number": edited(lambda body: body.update(address=3)),
    "no address": edited(lambda body: body.pop("address")),
    "a spec that is no JSON": edited(lambda body: body.update(spec="{")),
    "a spec that is a list": edited(lambda body: body.update(spec="[1]")),
    "a deep spec": edited(lambda body: body.update(spec=DEEP.decode())),
    "a spec that is an object": edited(lambda body: body.update(spec={"n": 1})),
    "inputs that are a list": edited(lambda body: body.update(inputs=["data/mix/m"])),
    "an input without a hash": edited(lambda body: body["inputs"].update(x=None)),
    "files that are a list": edited(lambda body: body.update(files=[])),
    "facts that are a list": edited(lambda body: body.update(facts=[])),
    "a listed file that is not there": edited(listing("more.bin")),
    "a listed file above": edited(listing("../more.bin")),
    "a listed file at the root": edited(listing("/etc/hostname")),
    "a listed device": edited(listing("/dev/null")),
    "a listed folder": edited(listing(".")),
}
FILE_ENTRIES: dict[str, Damage] = {  # of a manifest that lists files
    "a size that is a text": edited(first_file(size="1024")),
    "a size that is a fraction": edited(first_file(size=1024.0)),
    "a huge size": edited(first_file(size=10**400)),
    "a negative size": edited(first_file(size=-1)),
    "a size that is true": edited(first_file(size=True)),
    "another hash": edited(first_file(sha256="0" * 64)),
    "a hash that is a list": edited(first_file(sha256=[])),
    "an entry that is a text": edited(lambda body: body["files"].update(dict.fromkeys(list(body["files"])[:1], "x"))),
}


def add(name: str, make: Callable[[Path], object]) -> Damage:
    """Something more in the folder of a manifest."""

    def damage(manifest: Path) -> None:
        path = manifest.parent / name
        path.parent.mkdir(exist_ok=True)
        make(path)

    return damage


ADDED: dict[str, tuple[Damage, str]] = {  # in an artifact's folder, with the name that is said
    "a file more": (add("more.bin", lambda path: path.write_bytes(b"x")), "more.bin"),
    "an empty file more": (add("adapter_config.json", lambda path: path.touch()), "adapter_config.json"),
    "a file more below": (add("sub/more.bin", lambda path: path.touch()), "sub/more.bin"),
    "a FIFO more": (add("more.fifo", os.mkfifo), "more.fifo"),
    "a link more": (add("more.bin", lambda path: path.symlink_to("/etc/hostname")), "more.bin"),
    "a linked folder more": (add("additional_chat_templates", lambda path: path.symlink_to("/etc")), "additional_"),
    "a dangling link more": (add("more.bin", lambda path: path.symlink_to("/nowhere")), "more.bin"),
}
