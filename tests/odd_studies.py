"""Odd study files as data: what a study may never do to the program that reads it.

Each case is a file's content and a part of the line that refuses it; ``VALID`` are odd, and studies all the same.
"""

import json
from pathlib import Path

TEXT = (Path(__file__).parent / "unit" / "study.yaml").read_text()
COMMIT = "a" * 40


def changed(old: str, new: str) -> str:
    """The miniature study with one place changed."""
    assert old in TEXT, old
    return TEXT.replace(old, new, 1)


def added(text: str) -> str:
    return f"{TEXT}\n{text}\n"


def dataset(entry: str, name: str = "own") -> str:
    return changed("datasets:\n", f"datasets:\n  {name}: {entry}\n")


def hub(**keys: str) -> str:
    entry = {"kind": "hub", "repo": "a/b", "revision": COMMIT, "layout": "text", "domain": "x", "license": "y", **keys}
    return dataset(json.dumps(entry))


def prompt(text: str) -> str:
    return changed("    format: letter\n", f"    format: letter\n    prompt: {json.dumps(text)}\n")


def chain(length: int) -> str:
    """Models that start from the one behind them; the last is listed first."""
    first = f"    m0: {{<<: *student, init: {'base/pivot' if length == 1 else 'trained/m1'}}}\n"
    inits = [f"trained/m{i + 1}" if i < length - 1 else "base/pivot" for i in range(1, length)]
    models = [f"    m{i}: {{<<: *student, init: {init}}}\n" for i, init in enumerate(inits, 1)]
    return changed("  merged:\n", first + "".join(models) + "  merged:\n")


def cycle(length: int) -> str:
    models = [f"    m{i}: {{<<: *student, init: trained/m{(i + 1) % length}}}\n" for i in range(length)]
    return changed("  merged:\n", "".join(models) + "  merged:\n")


REFUSED: dict[str, tuple[str | bytes, str]] = {
    # ------------------------------------------------------------------------------- what is no YAML, or no mapping
    "empty": ("", "a study is a mapping of keys"),
    "only a comment": ("# nothing\n", "a study is a mapping of keys"),
    "a list": ("- a\n- b\n", "a study is a mapping of keys"),
    "a word": ("hello\n", "a study is a mapping of keys"),
    "an HTML page": ("<html><body>404</body></html>", "a study is a mapping of keys"),
    "TOML": ('title = "x"\n[models]\n', "a study is a mapping of keys"),
    "another JSON": ('{"title": "x"}', ":1: models: is missing"),
    "two documents": (f"{TEXT}\n---\n{TEXT}", "but found another document"),
    "a newer YAML": (f"%YAML 9.9\n---\n{TEXT}", "version 1.* is required"),
    "UTF-16": (TEXT.encode("utf-16"), ":1: not UTF-8: byte 0 is 0xff"),
    "UTF-32": (TEXT.encode("utf-32"), ":1: not UTF-8: byte 0 is 0xff"),
    "Latin-1": (b"title: x\nx-a: \xe9\n", ":2: not UTF-8: byte 14 is 0xe9"),
    "bytes": (bytes(range(256)) * 50, "not UTF-8"),
    "NUL": (b"title: x\nx-a: \x00\n", ":2: the character 0x0000 is not allowed"),
    "a control character": ("title: x\n\nx-a: \x9f\n", ":3: the character 0x009f is not allowed"),
    "a tab that indents": ("title: x\n\tscale: y\n", ":2: found character '\\t'"),
    "a quote that never ends": (added('x-a: "abc'), "found unexpected end of stream"),
    "a list that never ends": (added("x-a: {a: [1, 2"), "expected ',' or ']'"),
    "an unknown anchor": ("x-a: *nope\n", ":1: found undefined alias 'nope'"),
    "100 MB": (b"# pad pad\n" * 10_000_000, ":1: is larger than 1 MiB"),
    # ------------------------------------------------------------------------------------------- depth and repetition
    "a deep list": ("[" * 100_000, ":1: nested more than 50 levels deep"),
    "a deep list with an end": (f"x: {'[' * 5000}{']' * 5000}\n", ":1: nested more than 50 levels deep"),
    "deep JSON": ('{"a":' * 50_000 + "1" + "}" * 50_000, ":1: nested more than 50 levels deep"),
    "a deep block": ("\n".join(" " * i + "a:" for i in range(900)), ":50: nested more than 50 levels deep"),
    "a deep value": (changed("title: ", "x-a: " + "[" * 150 + "]" * 150 + "\ntitle: "), "nested more than 50 levels"),
    "anchors inside anchors": (
        "x0: &a0 []\n" + "".join(f"x{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 900)),
        "nested more than 50 levels deep",
    ),
    "anchors that multiply": (
        "x-0: &b0 [x]\n" + "".join(f"x-{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "anchors that repeat anchors make more than 40,000 entries",
    ),
    "merges that multiply": (
        "x-0: &m0 {a: 1}\n"
        + "".join(f"x-{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
        "anchors that repeat anchors make more than 40,000 entries",
    ),
    "an anchor in itself": (added("x-a: &a [*a]"), "an anchor contains itself"),
    "a merge of itself": (added("x-a: &a\n  <<: *a"), "an anchor contains itself"),
    "a merge of a number": (added("x-a:\n  <<: 5"), "expected a mapping or list of mappings for merging"),
    "too many entries": (added(f"x-a: [{'1, ' * 50_000}1]"), "more than 40,000 keys and values"),
    "a long chain of models": (chain(500), "is at the end of a chain of more than 100 models"),
    "a long cycle of models": (cycle(1500), "needs itself: trained/m"),
    # -------------------------------------------------------------------------------------------------- types and keys
    "a Python object": (added("x-a: !!python/object/apply:os.system ['id']"), "no values of type !!python/object"),
    "a Python name": (added("x-a: !!python/name:os.system"), "no values of type !!python/name:os.system"),
    "a tag": (added("x-a: !foo bar"), "no values of type !foo"),
    "binary": (changed("title: ", "x-b: !!binary '%%%'\ntitle: "), ":3: a study has no values of type !!binary"),
    "a set": (added("x-a: !!set {a, b}"), "no values of type !!set"),
    "an ordered map": (added("x-a: !!omap 5"), "no values of type !!omap"),
    "a timestamp": (added("x-a: !!timestamp 2001-13-45"), "no values of type !!timestamp"),
    "a map that is none": (added("x-a: !!map 5"), "expected a mapping node"),
    "an integer that is a map": (added("x-a: !!int {a: 1}"), "expected a scalar node"),
    "a key that is a number": (added("5: x"), "'5' is read as int: put it in quotes"),
    "a key that is null": (dataset("{kind: path}", "~"), ":29: a key must be a word; '~' is read as null"),
    "a key that is true": (added("true: x"), "'true' is read as bool"),
    "a key that is no number": (dataset("{kind: path}", ".nan"), ":29: a key must be a word; '.nan' is read as float"),
    "a key that is a list": (added("? [a]\n: x"), "a key must be a plain word"),
    "a key twice": (added("title: again"), "key 'title' again (first on line 3)"),
    "a key twice deep down": (changed("  raw: # what", "  raw: {}\n  raw: # what"), "key 'raw' again"),
    "a list for a word": (changed("target: kd", "target: [kd]"), "models.trained.kd-code.fusion.target: got"),
    "a map for a word": (changed("method: ta", "method: {ta: 1}"), "models.merged.ta-homogeneous.method: got"),
    "null for a map": (
        changed("items: {kind: generated, generator: animals, form: test, rows: 300}", "items:"),
        "got None",
    ),
    "a word for a row": (
        changed("- {model: base/pivot, category: Pivot, label: Pivot}", "- base/pivot"),
        "tables.table2.rows[0]: got 'base/pivot'",
    ),
    # ------------------------------------------------------------------------------------------------------- numbers
    "a number of 5,000 digits": (changed("max_length: 128", "max_length: " + "9" * 5000), ":46: the number 9999"),
    "a number of 400 digits": (changed("rows: 3000", "rows: " + "9" * 400), "(400 digits) is too large"),
    "2^63": (changed("max_length: 128", "max_length: 9223372036854775808"), "is too large: 2^63 or more"),
    "infinity": (changed("  lr: 4e-3\n", "  lr: .inf\n"), "lr: got inf (float); expected a finite number"),
    "no number": (changed("wrong: 0.35", "wrong: .nan"), "wrong: got nan (float)"),
    "1e400": (changed("  lr: 4e-3\n", "  lr: 1e400\n"), "lr: got inf"),
    "1e-400": (changed("  lr: 4e-3\n", "  lr: 1e-400\n"), "lr: got 0.0"),
    "a negative number": (changed("  steps: 400\n", "  steps: -400\n"), "steps: got -400"),
    "octal": (changed("  steps: 400\n", "  steps: 0o17\n"), "steps: got '0o17' (str)"),
    "hexadecimal": (changed("  steps: 400\n", "  steps: 0x10\n"), "steps: got '0x10' (str)"),
    "minutes and seconds": (changed("  steps: 400\n", "  steps: 1:30\n"), "steps: got '1:30' (str)"),
    "a thousand with a line": (changed("  steps: 400\n", "  steps: 1_000\n"), "steps: got '1_000' (str)"),
    "a date": (changed("  steps: 400\n", "  steps: 2024-01-01\n"), "steps: got '2024-01-01' (str)"),
    "true for a count": (changed("noisy-code: 450", "noisy-code: true"), "noisy-code: got True (bool)"),
    "nothing for a count": (changed("noisy-code: 450", "noisy-code:"), "noisy-code: got None"),
    "a list for a count": (changed("noisy-code: 450", "noisy-code: [450]"), "noisy-code: got [450] (list)"),
    "up to less than nothing": (changed("noisy-code: 450", "noisy-code: {up_to: -1}"), "noisy-code.up_to: got -1"),
    "up to nothing": (changed("noisy-code: 450", "noisy-code: {}"), "noisy-code.up_to: is missing"),
    "up to, misspelt": (changed("noisy-code: 450", "noisy-code: {upto: 4}"), "did you mean 'up_to'?"),
    "no items": (changed("    format: letter\n", "    format: letter\n    limit: 0\n"), "tasks.mmlu.limit: got 0"),
    # --------------------------------------------------------------------------------------- names, paths, addresses
    "a name with a slash": (dataset("{kind: path}", "a/b"), "datasets.a/b: a name is made of"),
    "a name with a space": (dataset("{kind: path}", "'a b'"), "a name is made of"),
    "a name with a line break": (dataset("{kind: path}", r'"a\nb"'), "a name is made of"),
    "a name with NUL": (dataset("{kind: path}", r'"a\0b"'), "a name is made of"),
    "a name of dots": (dataset("{kind: path}", "'..'"), "a name is made of"),
    "a name with a capital": (dataset("{kind: path}", "A"), "a name is made of"),
    "a name beyond ASCII": (dataset("{kind: path}", "é"), "a name is made of"),
    "a name with a wildcard": (dataset("{kind: path}", "'{model}'"), "a name is made of"),
    "a name with a command": (dataset("{kind: path}", "'a$(id)'"), "a name is made of"),
    "a name of 81 characters": (dataset("{kind: path}", "a" * 81), "at most 80 characters"),
    "a name of a folder": (dataset("{kind: path}", "results"), "is the name of the folder of all results"),
    "a name of a record": (
        added("  table2.provenance: {tasks: [mmlu], rows: [{model: base/pivot, category: a, label: b}]}"),
        "would both write table2.provenance.json",
    ),
    "a directory with a line break": (changed("directory: runs/mini", r'directory: "x\ny"'), "control characters"),
    "a directory that is too long": (changed("directory: runs/mini", f"directory: {'a' * 300}"), "255 between two"),
    "a home directory": (changed("directory: runs/mini", "directory: ~/runs"), "~ is not expanded"),
    "a path that is too long": (
        dataset(f"{{kind: path, path: {'a/' * 900}, layout: text, domain: x, license: y}}"),
        "a path has at most 1000 bytes",
    ),
    "an address that climbs": (changed("  init: base/pivot\n", "  init: base/../x\n"), "the address of a model"),
    "files outside the repository": (hub(files="../../etc/passwd"), "expected a file of the repository"),
    "files somewhere else": (hub(files="https://example.org/x.parquet"), "expected a file of the repository"),
    "a repository that climbs": (hub(repo="../x"), "expected a repository id"),
    "a repository with a revision": (hub(repo="a/b@main"), "expected a repository id"),
    "a bucket": (hub(repo="buckets/x"), "a bucket has no commits"),
    "a split with a command": (hub(split="$(id)"), "datasets.own.split: got"),
    # ------------------------------------------------------------------------------------------------------ templates
    "a template with deep brackets": (prompt("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), "nested too deeply"),
    "a template with deep blocks": (prompt("{% if 1 %}" * 2000 + "{% endif %}" * 2000), "nested too deeply"),
    "a template of a megabyte": (prompt("a" * 500_000), "a template has at most 50,000"),
    "a template with a constant that would fill the memory": (
        prompt("{{ 'a' * 10**10 }}{{ question }}"),
        "tasks.mmlu.prompt: is no safe Jinja template: line 1: it does more work",
    ),
    "a template with unknown fields": (prompt("{{ x }}"), "tasks.mmlu.prompt: reads x"),
    "a chat template that is none": (added('chat_template: "{{ messages"'), "is no Jinja template"),
    # ------------------------------------------------------------------------------------------------ keys that changed
    "the share that was called English": (
        changed("max_length: 128", "max_length: 128\n    english: 0.9"),
        "mixes.raw.english: is replaced: write languages: [en]",
    ),
    "a title that a terminal obeys": (
        changed("title: InfiFusion's Table 2 in miniature", 'title: "\\e]0;x\\a"'),
        ":3: title: got '\\x1b]0;x\\x07': it is shown as it is, and has no control characters",
    ),
    "a label with a carriage return": (changed("label: MMLU-like", 'label: "MMLU\\r100"'), "tasks.mmlu.label: got"),
    "a licence with a NUL": (
        dataset('{kind: path, path: x, layout: text, domain: x, license: "m\\0"}'),
        "license: got",
    ),
    "a key that a terminal obeys": (added('"\\e[2J": 1'), ": '\\x1b[2J': unknown key"),
    "a key of two lines": (added('"a\\n  b": 1'), ": 'a\\n  b': unknown key"),
    "a language by its name": (
        changed("max_length: 128", "max_length: 128\n    languages: [english]"),
        "mixes.raw.languages[0]: got 'english'; expected ISO 639-1 codes",
    ),
}

VALID: dict[str, str | bytes] = {
    "with a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "with carriage returns": TEXT.replace("\n", "\r\n"),
    "with an end": f"{TEXT}\n...\n",
    "of YAML 1.1": f"%YAML 1.1\n---\n{TEXT}",
    "with anchors nested": added("x-deep: " + "[" * 40 + "]" * 40),
    "with a command as a title": changed("title: InfiFusion's Table 2 in miniature", "title: '$(id) {x} %s `id` \\'"),
    "with a right-to-left label": changed("label: MMLU-like", 'label: "\u202eMMLU"'),
    "with a name that looks like a file": changed("  table2:", "  manifest.json:"),
    "with a chain of 90 models": chain(90),
    "with as many samples as there are": changed("noisy-code: 450", "noisy-code: {up_to: 99999}"),
    "with a zero before a number": changed("  steps: 400\n", "  steps: 0400\n"),
    "with a pattern of files": hub(files="data/train_1M-*.parquet", split="train_1M"),
    "with a limit": changed("    format: letter\n", "    format: letter\n    limit: 5\n"),
}
