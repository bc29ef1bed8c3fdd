"""A merge outside a study: options from ``KEY=VALUE`` words, a draft that is renamed into place, a manifest of its own."""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llmfusion.artifacts.job import format_bytes
from llmfusion.artifacts.lease import Lease
from llmfusion.errors import UserError, require
from llmfusion.io.files import sha256_file
from llmfusion.merging.plan import MergePlan
from llmfusion.merging.report import in_force, summary, write_card
from llmfusion.study.errors import from_pydantic
from llmfusion.study.schema.merging import Merge
from llmfusion.study.strict_yaml import load_text


def merge_folders(work: MergePlan, out: Path, threads: int | None = None) -> None:
    """Merge into a draft beside the place, then rename. What is refused leaves nothing; what is killed leaves what it has finished."""
    from llmfusion.merging import engine

    place = out.resolve()
    pivot = work.matching.pivot.folder
    models = [model.folder for model in work.matching.models]
    options = in_force(work.options)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft, started = place.parent / f".{place.name}.draft", time.monotonic()
    with Lease(place.parent / f".{place.name}.lease") as lease:
        require(not place.exists(), f"{place}: exists already; another process has just made it")
        needed, free = work.written - _size(draft), shutil.disk_usage(place.parent).free
        require(
            needed <= free,
            f"the merge needs {format_bytes(needed)} more, {format_bytes(free)} are free in {place.parent}: free some, or take another --out",
        )
        try:
            facts, checksums = engine.run(work, draft, work.identity(), threads, engine.progress_callback(started))
            write_card(draft, work.options, str(pivot), [str(model) for model in models], facts)
            (draft / "manifest.json").write_text(
                json.dumps(_manifest(work, draft, options, facts, checksums), indent=1) + "\n"
            )
        except (UserError, OSError):
            shutil.rmtree(draft, ignore_errors=True)
            raise
        lease.check()  # outside: the draft may be another writer's now
        os.rename(draft, place)
    if work.options.out_dtype != "pivot":
        print(
            f"note: config.json is the pivot's; load with dtype={work.options.out_dtype!r} to have the weights as they are stored",
            file=sys.stderr,
        )
    if "warning" in facts:
        print(f"warning: {facts['warning']}", file=sys.stderr)
    print(f"{out}: {summary(facts)} in {time.monotonic() - started:.1f} s")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _manifest(
    work: MergePlan, folder: Path, options: dict[str, Any], facts: dict[str, Any], checksums: dict[str, str]
) -> dict[str, Any]:
    """What the folder was made from and holds: sha256 of all files but the weights, whose tensors have an XXH3 checksum each.

    Inputs are told by their own manifest's sha256 where they have one, and by sizes and the sha256 of their headers.
    """
    inside = {name: {tensor: checksums[tensor] for tensor in layout.entries} for name, layout in work.files.items()}
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in inside)
    files: dict[str, Any] = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in others
    }
    files |= {name: {"size": work.files[name].size, "xxh3": tensors} for name, tensors in inside.items()}
    return {
        "made_by": "llmfusion merge",
        "method": work.options.method,
        "options": options,
        "pivot": _described(work.matching.pivot.folder, {part.pivot.file for part in work.parts}),
        "models": [
            _described(model.folder, {entry.file for entry in model.entries.values()}) for model in work.matching.models
        ],
        "files": files,
        "facts": facts,
    }


def _described(folder: Path, files: set[Path]) -> dict[str, Any]:
    own = folder / "manifest.json"
    headers = {
        file.name: {"size": file.stat().st_size, "header_sha256": _header_sha256(file)} for file in sorted(files)
    }
    return {"folder": str(folder), **({"manifest_sha256": sha256_file(own)} if own.is_file() else {}), "files": headers}


def _header_sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.sha256(handle.read(int.from_bytes(handle.read(8), "little"))).hexdigest()


def check_options(method: str, pairs: list[str], count: int) -> Any:
    """Options from ``KEY=VALUE`` words, checked as a study's would be. Raises :class:`UserError` with all mistakes."""
    entry: dict = {"method": method, "pivot": "base/pivot", "parents": [f"trained/{i}" for i in range(count)]}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals), f"--set {pair}: expected KEY=VALUE")
        require(
            key not in ("method", "pivot", "parents"),
            f"--set {pair}: {key} is no option of the method; give --method, --pivot or --models",
        )
        try:
            entry[key] = load_text(f"[{value}]" if "," in value else value)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # the last two: PyYAML on "!!bool x"
            raise UserError(
                f"--set {pair}: expected a number, a word or a list of numbers with commas between"
            ) from None
    adapter: TypeAdapter = TypeAdapter(Merge)
    try:
        checked = adapter.validate_python(entry)
    except ValidationError as error:
        raise UserError(
            "\n  ".join(
                f"{'.'.join(map(str, p.key))}: {p.text}" for p in from_pydantic(error, entry, adapter.json_schema())
            )
        ) from None
    weight = getattr(checked, "weight", None)
    if isinstance(weight, list):
        require(len(weight) == count, f"weight: {len(weight)} values for {count} models; give one value, or one each")
    return checked
