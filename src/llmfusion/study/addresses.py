"""Addresses and files: ``models/base/p`` and ``results/models/base/p/manifest.json`` name the same artifact.

An artifact is a folder with a manifest, a single file ``results/ADDRESS.json`` (scores), or a table:
``results/NAME.csv`` beside its manifest.
"""

import re
from pathlib import Path

from llmfusion.errors import UserError

# of jobs that do a part of another artifact's work: teachers/shards/base/p/mix/1-of-4
SHARD = re.compile(r"([^/]+)/shards/(.+)/\d+-of-\d+")
TABLES = "tables/"
FINGERPRINTS = Path("work/fingerprints.json")  # of all artifacts of the study that Snakemake was last started with
SINGLE_FILES = "scores/"


def output_of(address: str) -> str:
    """The file that a job declares, relative to the study's directory: a manifest, a score, or a table."""
    if address.startswith(SINGLE_FILES):
        return f"results/{address}.json"
    if address.startswith(TABLES):
        return f"results/{address.removeprefix(TABLES)}.csv"
    return f"results/{address}/manifest.json"


def address_of(path: str | Path) -> str:
    """The address behind a declared output: ``results/models/base/p/manifest.json`` -> ``models/base/p``.

    Raises :class:`UserError` for a path in no ``results/`` folder.
    """
    inner = Path(*Path(path).parts[results_index(path) + 1 :])
    if inner.name == "manifest.json":
        return str(inner.parent)
    return str(inner.with_suffix("")) if len(inner.parts) > 1 else f"{TABLES}{inner.stem}"


def results_index(path: str | Path) -> int:
    """Position of the ``results`` folder among a path's parts: the last one with an artifact's file behind it.

    Raises :class:`UserError` if there is none. No entry of a study may be named ``results``
    (:data:`llmfusion.study.schema.base.Name`), so the last one is the study's own, wherever the study lies.
    """
    parts = Path(path).parts
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "results" and (parts[-1] != "manifest.json" or len(parts) - i > 3):
            return i
    raise UserError(f"{path}: lies in no results/ folder of a study")


def manifest_of(output: Path) -> Path:
    """The manifest that goes with a declared output: itself, or for a table the .json beside it."""
    return output if output.name == "manifest.json" else output.with_suffix(".json")


def provenance_of(output: Path) -> Path:
    """The record of how a declared output came to be: beside its manifest."""
    in_folder = output.name == "manifest.json"
    return output.with_name("provenance.json") if in_folder else output.with_suffix(".provenance.json")


def costs_of(table: Path) -> Path:
    """The report of what a table took, beside any of its files; no artifact."""
    return table.with_suffix(".cost.csv")


def files_beside_others(address: str) -> list[str]:
    """All files of an artifact without a folder of its own: a score, or a table (CSV and Markdown, too; its costs).

    Relative to the study's directory; none for an artifact in a folder.
    """
    output = Path(output_of(address))
    if address.startswith(SINGLE_FILES):
        return [str(output), str(provenance_of(output))]
    if address.startswith(TABLES):
        own = (output, output.with_suffix(".md"), manifest_of(output), provenance_of(output), costs_of(output))
        return [str(path) for path in own]
    return []


def is_shard(address: str) -> bool:
    """Whether this is a job that does a part of another artifact's work (:func:`whole_of`)."""
    return SHARD.fullmatch(address) is not None


def whole_of(address: str) -> str:
    """The artifact that a shard is a part of: ``teachers/shards/base/p/mix/1-of-4`` -> ``teachers/base/p/mix``."""
    shard = SHARD.fullmatch(address)
    return "/".join(shard.groups()) if shard else address
