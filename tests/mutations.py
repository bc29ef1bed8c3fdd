"""Random mistakes put into a study, as data and as text."""

import json
import random
from typing import Any

JUNK: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**400, 1e308, float("nan")),
    *("", "x", "no", "1e-6", "base/pivot", "a/b/c", "\n", "é", "x" * 300),
    *([], {}, [[]], {"kind": "x"}, {"kind": []}, {"method": {}}, {"target": None}, {"1": 2}),
    ["base/code", "base/code"],
]


def _places(node: Any, path: tuple = ()) -> list[tuple]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [*([path] if path else []), *(p for key, value in inner for p in _places(value, (*path, key)))]


def _at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key]
    return node


def mutate(data: dict, draw: random.Random) -> None:
    """Drop, rename, overwrite or copy one entry anywhere in ``data``."""
    place = draw.choice(_places(data))
    holder, key = _at(data, place[:-1]), place[-1]
    what = draw.choice(["drop", "junk", "rename", "copy"])
    if what == "rename" and isinstance(holder, dict):
        holder[draw.choice(["kind", "5", "null", "true", "x/y", f"{key}s"])] = holder.pop(key)
    elif what == "drop":
        del holder[key]
    else:
        copy = draw.choice(JUNK) if what == "junk" else _at(data, draw.choice(_places(data)))
        holder[key] = copy if what == "junk" else json.loads(json.dumps(copy))


def as_yaml(data: dict) -> str:
    """The study as text; unquoted keys make ints, nulls and booleans of some."""
    return (
        json.dumps(data, indent=1)
        .replace('"5":', "5 :")
        .replace('"null":', "null :")
        .replace('"true":', "true :")
        .replace("NaN", ".nan")
    )


def mutate_text(text: str, draw: random.Random) -> bytes:
    """Damage the file itself: lines lost, doubled or swapped, tabs, a bit flipped, cut short."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    what = draw.choice(["drop", "double", "tab", "flip", "cut", "swap"])
    if what in ("drop", "double", "tab", "swap"):
        lines[at : at + 1] = {
            "drop": [],
            "double": [lines[at]] * 2,
            "tab": ["\t" + lines[at]],
            "swap": [lines[at - 1], lines[at]],
        }[what]
        return "".join(lines).encode()
    raw = bytearray(text.encode())
    if what == "cut":
        return bytes(raw[: draw.randrange(len(raw))])
    # still ASCII: Snakemake, which reads the file before us, wants UTF-8
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(7)
    return bytes(raw)
