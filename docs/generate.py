"""Write what follows from the code into the documents: the JSON schema of a study, tables between markers in Markdown.

``python docs/generate.py`` rewrites the files; ``--check`` only compares, and exits with status 1 where one is stale.

A marker names what stands between it and the next ``<!-- end -->``:

- ``<!-- keys: MODULE.CLASS -->``: the keys of a section of a study; ``without CLASS`` leaves out those of a base class.
- ``<!-- options: PACKAGE -->``: of every plug-in of a package, a heading and the keys of its own options.
- ``<!-- plugins: PACKAGE -->``: a table of the plug-ins of a package with their sentences.
- ``<!-- layouts: samples -->``, ``<!-- layouts: items -->``: what each layout reads.
"""

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from llmfusion.study.plugins import load_plugins, summary_of  # noqa: E402
from llmfusion.study.schema.base import Section  # noqa: E402
from llmfusion.study.schema.study import Study  # noqa: E402

DOCUMENTS = ("README.md", "config/README.md", "docs/architecture.md", "docs/extending.md")
MARKER = re.compile(r"(<!-- (keys|options|plugins|layouts): ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PATTERNS = {
    "commit": "[0-9a-f]{40}",
    "address": "(base|trained|merged)/",
    "`OWNER/NAME`": "/[A-Za-z0-9_]",
    "name": "[a-z0-9][a-z0-9._-]*",
}
LINKS = {  # where config/README.md describes a section, by the name of its model
    "Columns": "#columns",
    "Architecture": "#architecture",
    "Tokenizer": "#tokenizer",
    "RowEntry": "#tables",
    "Table": "#tables",
    "Mix": "#mixes",
    "Task": "#tasks",
    "Capture": "#capture-generation-answering",
    "Models": "#models",
    "Generation": "#capture-generation-answering",
    "Answering": "#capture-generation-answering",
    "HubSource": "#sources-of-rows",
    "HubDataset": "#datasets",
    "HubModel": "#base-models",
    "TrainedModel": "#trained-models",
}


def main() -> int:
    """Write or compare all documents. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Bring generated parts of the documents up to date.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is stale")
    check = parser.parse_args().check
    stale = [name for name, text in generated().items() if (ROOT / name).read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"{name} is out of date; run: make generated" if check else f"{name} written")
        if not check:
            (ROOT / name).write_text(generated()[name], encoding="utf-8")
    return int(check and bool(stale))


def generated() -> dict[str, str]:
    """Every document as it should be, by its path from the root of the clone."""
    out = {"config/schema.json": json.dumps(Study.model_json_schema(), indent=1) + "\n"}
    for name in DOCUMENTS:
        path = ROOT / name
        if path.exists():
            out[name] = MARKER.sub(_replacement, path.read_text(encoding="utf-8"))
    return out


def _replacement(marker: re.Match[str]) -> str:
    head, what, argument, _, end = marker.groups()
    return f"{head}\n{TABLES[what](argument)}\n\n{end}"


# ---------------------------------------------------------------------------------------------------- keys of sections
def keys_table(argument: str) -> str:
    """Keys of one section: required ones first."""
    name, _, without = argument.partition(" without ")
    module, _, cls = name.rpartition(".")
    model = getattr(import_module(module), cls)
    base = next((parent for parent in model.__mro__ if parent.__name__ == without), None)
    return _keys(model, set(base.model_fields) if base else set())


def _keys(model: type[Section], left_out: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    schema = model.model_json_schema(by_alias=True)
    required = schema.get("required", [])
    aliases = {field.alias or name for name, field in model.model_fields.items() if name in left_out}
    rows = []
    for key, entry in sorted(schema["properties"].items(), key=lambda pair: pair[0] not in required):
        if key in aliases:
            continue
        default = "required" if key in required else _default(entry)
        meaning = entry.get("description", "").replace("|", "\\|")
        rows.append(f"| `{key}` | {describe_type(entry, schema)} | {default} | {meaning} |")
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default")
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "all defaults"
    return f"`{json.dumps(value) if isinstance(value, (bool, list)) else value}`"


def describe_type(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema's type in words: ``integer > 0``, ``list of addresses``, ``mapping, see [Columns](#columns)``."""
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[1]
        return f"mapping, see [{name}]({LINKS[name]})" if name in LINKS else "mapping"
    if "discriminator" in entry:
        return describe_type(entry["oneOf"][0], schema)
    if "anyOf" in entry or "oneOf" in entry:
        either = entry.get("anyOf", entry.get("oneOf"))
        options = [describe_type(option, schema) for option in either if option.get("type") != "null"]
        return ", or ".join(dict.fromkeys(options))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        words = [f"`{value}`" for value in entry["enum"]]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return _plain_type(entry, schema)


def _plain_type(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    kind = entry.get("type")
    if kind == "boolean":
        return "`true` or `false`"
    if kind in ("integer", "number"):
        bounds = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= "}
        limits = [f"{sign}{entry[bound]:g}" for bound, sign in bounds.items() if bound in entry]
        return " ".join([kind, ", ".join(limits)]).strip()
    if kind == "array":
        count = entry.get("maxItems")
        return " ".join(filter(None, ["list of", str(count or ""), _plural(entry["items"], schema)]))
    if kind == "object":
        inner = entry.get("additionalProperties") or next(iter(entry.get("patternProperties", {}).values()), {})
        return f"name: {describe_type(inner, schema)}" if inner else "mapping"
    pattern = entry.get("pattern", "")
    return next((word for word, part in PATTERNS.items() if part in pattern), "text")


def _plural(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    word = describe_type(entry, schema)
    first, _, rest = word.partition(" ")
    plurals = {"address": "addresses", "name": "names", "text": "texts", "number": "numbers", "integer": "integers"}
    return " ".join(filter(None, [plurals.get(first, first), rest]))


# ------------------------------------------------------------------------------------------------------------ plug-ins
def options_tables(package: str) -> str:
    """The own keys of every plug-in's options, under a line that names it; nothing of those that have none."""
    tag = "method" if package.endswith("methods") else "target"
    parts = []
    for name, plugin in load_plugins(package, "Options").items():
        parents = [base for base in plugin.Options.__mro__[1:] if hasattr(base, "model_fields")]
        own = set(plugin.Options.model_fields) - {tag}.union(*(base.model_fields for base in parents))
        if own:
            table = _keys(plugin.Options, set(plugin.Options.model_fields) - own)
            parts.append(f"`{tag}: {name}`: {summary_of(package, name)}.\n\n{table}")
    return "\n\n".join(parts)


def plugins_table(package: str) -> str:
    """Names and sentences."""
    rows = [f"| `{name}` | {summary_of(package, name)} |" for name in load_plugins(package)]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def layouts_table(what: str) -> str:
    """Columns that each layout reads, and what it is known from or makes."""
    from llmfusion.data.layout import item_layouts, sample_layouts

    if what == "samples":
        rows = [f"| `{name}` | {layout.reads} | {layout.example} |" for name, layout in sample_layouts().items()]
        return "\n".join(["| `layout` | reads | as in |", "|---|---|---|", *rows])
    fields = {name: ", ".join(f"`{field}`" for field in layout.fields) for name, layout in item_layouts().items()}
    rows = [f"| `{name}` | {layout.reads} | {fields[name]} |" for name, layout in item_layouts().items()]
    return "\n".join(["| `layout` | reads | fields of the item |", "|---|---|---|", *rows])


TABLES = {"keys": keys_table, "options": options_tables, "plugins": plugins_table, "layouts": layouts_table}

if __name__ == "__main__":
    sys.exit(main())
