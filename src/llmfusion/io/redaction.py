"""Secrets out of everything that is printed, logged or kept: libraries put what they were given into their messages.

A secret is the value of an environment variable whose name says so, the password in an address that any environment
variable holds, and the token that ``huggingface_hub`` has stored. It is found also percent-encoded (in part, or
twice), with backslashes as ``repr`` and JSON write it, and inside base64, as in the header ``Authorization: Basic``.
"""

import base64
import html
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|JWT)", re.IGNORECASE
)
PLACE_NAME = re.compile(r"_(PATH|FILE|DIR|SOCK)$", re.IGNORECASE)  # where a secret lies is none
SHORTEST_VALUE = 8  # of a variable that is taken for a secret: shorter ones, such as 1, are in every text
SHORTEST_PASSWORD = 4
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s\"'<>]+@")
USER_IN_VALUE = re.compile(r"://([^/?#\s]*)@")
# a password with a character that an address must encode: the libraries take what follows it for the path
UNENCODED_USER = re.compile(r"://([^/?#\s:@]*:(?!\d+[/?#])\S*[/?#]\S*)@")
BASE64 = "[A-Za-z0-9+/_-]"


def redacted(text: str) -> str:
    """``text`` without secrets: each is replaced by the name of what holds it, users in addresses by ``<user>``."""
    text = USER_IN_ADDRESS.sub("<user>@", text)
    for pattern, name in _patterns(tuple(sorted(os.environ.items()))):
        text = pattern.sub(name, text)
    return text


@lru_cache(maxsize=4)
def _patterns(environment: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern[str], str]]:
    """What to look for and what to write instead, the longest secret first."""
    secrets: dict[str, str] = {}
    for secret, name in _secrets(dict(environment)):
        secrets.setdefault(secret, name)
    ordered = sorted(secrets.items(), key=lambda item: -len(item[0]))
    return [(re.compile(f"{_spellings(secret)}|{_inside_base64(secret)}"), f"<{name}>") for secret, name in ordered]


def _secrets(environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every secret with the name of what holds it."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and not PLACE_NAME.search(name):
            yield from ((part, name) for part in {value, *value.splitlines()} if len(part) >= SHORTEST_VALUE)
        yield from ((secret, f"password in {name}") for secret in _in_addresses(value))
    for token in _stored_tokens(environment):
        yield token, "stored token"


def _in_addresses(value: str) -> Iterator[str]:
    """Passwords in the addresses of a value, as they stand there and decoded."""
    users = [*USER_IN_VALUE.findall(value), *UNENCODED_USER.findall(value)]
    for user in {*users, *map(unquote, users)}:
        name, colon, password = user.partition(":")
        if not colon:  # a token alone, as in https://TOKEN@host
            yield from (word for word in [name] if len(name) >= SHORTEST_VALUE)
            continue
        pieces = {password, *re.split(r"[/?#]", password)}
        yield from (piece for piece in pieces if len(piece) >= SHORTEST_PASSWORD)
        if password:
            yield user


def _stored_tokens(environment: dict[str, str]) -> Iterator[str]:
    """Tokens in the file that ``huggingface_hub`` reads where HF_TOKEN is not set."""
    cache = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "/nonexistent")) / ".cache")
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(environment.get("HF_TOKEN_PATH") or f"{home}/token")
    try:
        words = path.read_text(errors="replace").split() if path.is_file() else []
    except OSError:
        return
    yield from (word for word in words if len(word) >= SHORTEST_VALUE)


def _spellings(secret: str) -> str:
    """A regular expression that matches a secret with any of its characters encoded or escaped."""
    return "".join(_spellings_of(character) for character in secret)


def _spellings_of(character: str) -> str:
    encoded = "".join(f"%(?:25)*(?i:{byte:02X})" for byte in character.encode("utf-8", "surrogateescape"))
    out = [re.escape(character), encoded]
    if character == " ":
        out.append(r"\+")
    if character in "\"'\\/":
        out.append(rf"\\+{re.escape(character)}")
    if (entity := html.escape(character)) != character:
        out.append(re.escape(entity))
    if ord(character) > 126:
        out += [rf"\\+(?i:u{ord(character):04x})", rf"\\+(?i:x{ord(character):02x})"]
    return f"(?:{'|'.join(out)})"


def _inside_base64(secret: str) -> str:
    """A regular expression for the base64 of any text that holds the secret, from the secret to that text's end.

    Its digits depend on the number of bytes before it, modulo 3; the first and last may be a neighbour's in part.
    """
    data = secret.encode("utf-8", "surrogateescape")
    cores = set()
    for before in range(3):
        digits = base64.b64encode(b"\0" * before + data).decode()
        core = digits[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
        shared = BASE64 if before else ""  # a digit that is the neighbour's in part
        cores.add(shared + re.escape(core).replace(r"\+", "[+-]").replace("/", "[/_]"))
    return rf"(?:{'|'.join(sorted(cores))}){BASE64}*={{0,2}}"
