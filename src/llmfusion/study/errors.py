"""Every mistake in a study, told once: where, what was given, what is allowed, and the nearest name."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One mistake: the path of the key it concerns and a sentence for the user."""

    key: Key
    text: str


class StudyError(Exception):
    """The study cannot be used. ``str()`` is the complete message for the user, one line a mistake."""


def nearest(name: object, known: Iterable[str], limit: int = 12) -> str:
    """``did you mean 'x'?`` if a known name is close, else the names there are."""
    names = sorted(known)
    close = get_close_matches(str(name), names, 1, 0.6) if names else []
    if close:
        return f"did you mean {close[0]!r}?"
    if not names:
        return "there are none"
    return "there are: " + ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def report(file: str, problems: Iterable[Problem], lines: dict[Key, int]) -> str:
    """All problems sorted by line, as ``file:line: key: text``; without the line where none are known."""

    def line(key: Key) -> int:
        while key and key not in lines:
            key = key[:-1]
        return lines.get(key, 1)

    rows = sorted({(line(p.key), _dotted(p.key), p.text) for p in problems})
    head = f"{file}: {len(rows)} mistake{'s' * (len(rows) != 1)}; nothing was started"
    return "\n".join(
        [
            head,
            *(
                f"  {file}{f':{number}' if lines else ''}: {key + ': ' if key else ''}{text}"
                for number, key, text in rows
            ),
        ]
    )


def _dotted(key: Key) -> str:
    out = ""
    for part in key:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out


def from_pydantic(error: ValidationError, raw: Any, schema: dict) -> list[Problem]:
    """pydantic's errors in the words of the study: paths without union tags, allowed keys with the nearest one."""
    return [_problem(e, raw, schema) for e in error.errors(include_url=False)]


def _problem(error: Any, raw: Any, schema: dict) -> Problem:
    given, kind = error["input"], error["type"]
    key = _plain_key(error["loc"], raw, absent=kind == "missing")
    if kind == "extra_forbidden":
        return Problem(key, f"unknown key; {nearest(key[-1], _properties(error['loc'][:-1], schema))}")
    if kind == "missing":
        return Problem(key, "is missing")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag, context = str(error["ctx"]["discriminator"]).strip("'"), error["ctx"]
        expected = [e.strip(" '") for e in context.get("expected_tags", "").split(",") if e.strip()]
        if kind == "union_tag_not_found":
            return Problem(
                (*key, tag),
                "is missing" if isinstance(given, dict) else f"expected a mapping with key {tag}, got {_show(given)}",
            )
        return Problem((*key, tag), f"got {_show(context['tag'])}; {nearest(context['tag'], expected)}")
    if error["loc"] and error["loc"][-1] == "[key]":
        return Problem(
            key, "a name is made of lower-case letters, digits, '.', '_' and '-', and begins with a letter or digit"
        )
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error":
        return Problem(key, message)
    if kind == "literal_error":
        expected = [e.strip(" '") for e in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")]
        near = f"; {nearest(given, expected)}" if len(expected) > 3 else ""
        return Problem(key, f"got {_show(given)}; allowed: {message}{near}")
    if kind == "string_pattern_mismatch":
        message = PATTERNS.get(error["ctx"]["pattern"], message)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "a mapping of keys"
    if kind.endswith(("too_short", "too_long")):
        message = message.split("should have ")[-1].split(" after validation")[0]
    return Problem(key, f"got {_show(given)}; expected {message}")


PATTERNS = {
    r"^[0-9a-f]{40}$": "a commit of 40 hex digits (a branch can change under the study)",
    r"^(base|trained|merged)/[a-z0-9][a-z0-9._-]*$": "the address of a model: base/NAME, trained/NAME or merged/NAME",
    r"^[^/\s]+/[^/\s]+$": "a repository id: OWNER/NAME",
    r"^[a-z0-9][a-z0-9._-]*$": "a name of lower-case letters, digits, '.', '_' and '-'",
}


TAGS = ("kind", "method", "target")  # keys that choose between kinds of an entry


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _plain_key(loc: tuple, raw: Any, absent: bool) -> Key:
    """pydantic puts union tags into the path; keep only what the user wrote (and the last part if it is ``absent``)."""
    key: list[str | int] = []
    at, told = raw, None
    for i, part in enumerate(loc):
        if part == "[key]":
            continue
        if isinstance(at, dict) and at is not told and isinstance(part, str) and part in [at.get(tag) for tag in TAGS]:
            told = at  # this part is the tag (kind: path), the next may be a key of the same name
        elif (isinstance(at, dict) and part in at) or (
            isinstance(at, list) and isinstance(part, int) and part < len(at)
        ):
            at = at[part]
            key.append(part)
        elif absent and i == len(loc) - 1 and isinstance(at, dict):
            key.append(part)
    return tuple(key)


def _properties(loc: tuple, schema: dict) -> list[str]:
    """Keys allowed at a pydantic location, read from the JSON schema."""
    node = schema
    for part in loc:
        node = _step(_resolve(node, schema), part, schema)
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict, schema: dict) -> dict:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in node and "properties" not in node:
        for option in node["anyOf"]:
            if option.get("type") != "null":
                return _resolve(option, schema)
    return node


def _step(node: dict, part: str | int, schema: dict) -> dict:
    if "discriminator" in node:
        return (
            {"$ref": node["discriminator"]["mapping"].get(part, "#/$defs/none")}
            if part in node["discriminator"]["mapping"]
            else {}
        )
    if isinstance(part, int):
        return node.get("items", {})
    inner = node.get("properties", {}).get(part)
    if inner is None:
        extra = node.get("additionalProperties")
        inner = extra if isinstance(extra, dict) else next(iter(node.get("patternProperties", {}).values()), {})
    return inner
