"""Every mistake in a study, reported once: where, what was given, what is allowed, and the nearest name."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from llmfusion.errors import printable
from llmfusion.study.schema.base import REPOSITORY

Key = tuple[str | int, ...]
Location = tuple[str | int, ...]  # as pydantic gives it: a key with the tags of unions, and "[key]" for a name itself
Schema = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One mistake: the path of the key it concerns and a sentence for the user."""

    key: Key
    text: str


class StudyError(Exception):
    """The study cannot be used. ``str()`` is the complete message for the user, one line a mistake."""

    def __str__(self) -> str:
        return printable(super().__str__())


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

    rows = sorted({(line(problem.key), _dotted(problem.key), problem.text) for problem in problems})
    out = [f"{file}: {len(rows)} mistake{'s' * (len(rows) != 1)}; nothing was started"]
    for number, key, text in rows:
        place = f"{file}:{number}" if lines else file
        out.append(f"  {place}: {key + ': ' if key else ''}{text}")
    return "\n".join(out)


def _dotted(key: Key) -> str:
    out = ""
    for part in key:
        out += f"[{part}]" if isinstance(part, int) else f".{_word(part)}" if out else _word(part)
    return out


def _word(key: str) -> str:
    """A key as it is read on one line."""
    return key if key.isprintable() else repr(key)


def from_pydantic(error: ValidationError, raw: Any, schema: Schema) -> list[Problem]:
    """pydantic's errors in the words of the study: paths without union tags, allowed keys with the nearest one.

    ``raw`` is what was validated, ``schema`` the JSON schema of the model that refused it.
    """
    return [_problem(details, raw, schema) for details in error.errors(include_url=False)]


def _problem(error: Any, raw: Any, schema: Schema) -> Problem:
    kind = error["type"]
    key = _plain_key(error["loc"], raw, schema, absent=kind == "missing")
    if kind == "extra_forbidden" and (sentence := _replaced(error["loc"], schema)) is not None:
        return Problem(key, sentence)
    if kind == "extra_forbidden":
        return Problem(key, f"unknown key; {nearest(key[-1], _properties(error['loc'][:-1], schema))}")
    if kind == "missing":
        return Problem(key, "is missing")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(error, key)
    if kind == "value_error":
        return Problem(key, str(error["msg"]).removeprefix("Value error, "))
    if error["loc"] and error["loc"][-1] == "[key]":
        return Problem(key, LONG_NAME if kind == "string_too_long" else NAME)
    if kind == "literal_error":
        return _literal_problem(error, key)
    return Problem(key, f"got {_show(error['input'])}; expected {_expected(error)}")


def _tag_problem(error: Any, key: Key) -> Problem:
    """An entry whose kind (the key that chooses between models, e.g. ``method``) is missing or unknown."""
    context = error["ctx"]
    discriminator = str(context["discriminator"]).strip("'")
    if error["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return Problem((*key, discriminator), f"got {_show(context['tag'])}; {nearest(context['tag'], allowed)}")
    if isinstance(error["input"], dict):
        return Problem((*key, discriminator), "is missing")
    text = f"expected a mapping with key {discriminator}, got {_show(error['input'])}"
    return Problem((*key, discriminator), text)


def _literal_problem(error: Any, key: Key) -> Problem:
    message = str(error["msg"]).removeprefix("Input should be ")
    allowed = [value.strip(" '") for value in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")]
    near = f"; {nearest(error['input'], allowed)}" if len(allowed) > 3 else ""
    return Problem(key, f"got {_show(error['input'])}; allowed: {message}{near}")


def _expected(error: Any) -> str:
    kind = error["type"]
    message = str(error["msg"]).removeprefix("Input should be ")
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(error["ctx"]["pattern"], message)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "a mapping of keys"
    if kind.endswith(("too_short", "too_long")):
        return message.split("should have ")[-1].split(" after validation")[0]
    return message


NAME = "a name is made of lower-case letters, digits, '.', '_' and '-', and begins with a letter or digit"
LONG_NAME = "a name has at most 80 characters"

PATTERNS = {
    r"^[0-9a-f]{40}$": "a commit of 40 hex digits (a branch can change under the study)",
    r"^(base|trained|merged)/[a-z0-9][a-z0-9._-]*$": "the address of a model: base/NAME, trained/NAME or merged/NAME",
    REPOSITORY: "a repository id: OWNER/NAME, of letters, digits, '.', '_' and '-'",
    r"^[a-z0-9][a-z0-9._-]*$": "a name of lower-case letters, digits, '.', '_' and '-'",
}


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _plain_key(loc: Location, raw: Any, schema: Schema, absent: bool) -> Key:
    """What the user wrote of a pydantic location, without union tags; the last part also where it is ``absent``."""
    key: list[str | int] = []
    value: Any = raw
    node: Schema = schema
    for i, part in enumerate(loc):
        node = _resolve(node, schema)
        is_tag = "discriminator" in node  # this part chooses a model (kind: path); the next may be a key of that name
        node = _inner(node, part)
        if is_tag or part == "[key]":
            continue
        written = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        if written:
            value = value[part]
        if written or (absent and i == len(loc) - 1 and isinstance(value, dict)):
            key.append(part)
    return tuple(key)


def _properties(loc: Location, schema: Schema) -> list[str]:
    """Keys allowed at a pydantic location, read from the JSON schema."""
    return list(_node(loc, schema).get("properties", {}))


def _replaced(loc: Location, schema: Schema) -> str | None:
    """What to write instead of a key that there was in earlier versions, or None."""
    sentence: str | None = _node(loc[:-1], schema).get("x-replaced", {}).get(loc[-1])
    return sentence


def _node(loc: Location, schema: Schema) -> Schema:
    """The JSON schema of what is at a pydantic location."""
    node = schema
    for part in loc:
        node = _inner(_resolve(node, schema), part)
    return _resolve(node, schema)


def _resolve(node: Schema, schema: Schema) -> Schema:
    """A node behind its references, and of an optional one what is not null."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    for option in node.get("anyOf", []) if "properties" not in node else []:
        if option.get("type") != "null":
            return _resolve(option, schema)
    return node


def _inner(node: Schema, part: str | int) -> Schema:
    """The node of one part of a location: a union's member by its tag, an item, a property, or any other entry."""
    inner: Any
    if "discriminator" in node:
        reference = node["discriminator"]["mapping"].get(part)
        inner = {} if reference is None else {"$ref": reference}
    elif "oneOf" in node:  # a number or a mapping: only the mapping has something inside
        inner = next((option for option in node["oneOf"] if "$ref" in option), {})
    elif isinstance(part, int):
        inner = node.get("items")
    elif part in node.get("properties", {}):
        inner = node["properties"][part]
    else:
        inner = node.get("additionalProperties")
        if not isinstance(inner, dict):
            inner = next(iter(node.get("patternProperties", {}).values()), None)
    return inner if isinstance(inner, dict) else {}
