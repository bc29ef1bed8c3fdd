"""Licences of artifacts: a source states its own, and what is made from sources inherits all of theirs.

A manifest's fact ``license`` is the text that the study declares for a source, or the licence of every source behind
an artifact, by the source's address. Filters and tests are not inherited: a mix has the licences of the datasets it
draws from, not those of the tokenizers that its samples must fit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.io.files import json_object_or_empty
from llmfusion.study.addresses import manifest_of, output_of

Licences = dict[str, str]  # by the address of the source


def inherited(made_from: Mapping[str, Artifact]) -> Licences:
    """Licences of what is made from these artifacts, by the address of each source behind them.

    Raises :class:`UserError` where a source states none.
    """
    found: Licences = {}
    for address, artifact in made_from.items():
        found |= _licences(address, artifact.manifest, artifact.folder)
    return dict(sorted(found.items()))


def licences_of(address: str, artifact: Artifact) -> Licences:
    """Licences of one artifact, by the address of each source behind it; raises :class:`UserError` as ``inherited``."""
    return inherited({address: artifact})


def licence_lines(licences: Licences) -> list[str]:
    """Lines of a model card: every licence, and what it comes with."""
    return [
        f"- {licence}: {', '.join(sorted(_short(source) for source, stated in licences.items() if stated == licence))}"
        for licence in sorted(set(licences.values()))
    ]


def _short(address: str) -> str:
    """``base/pivot`` of ``models/base/pivot``, ``dataset/chat`` of ``data/dataset/chat``."""
    return address.partition("/")[2]


def _licences(address: str, manifest: dict[str, Any], folder: Path) -> Licences:
    stated = manifest.get("facts", {}).get("license")
    if isinstance(stated, str) and stated.strip():
        return {address: stated}
    if isinstance(stated, dict) and stated:
        return stated
    # made by a version that did not list them: they stand in the manifests of what it was made from
    sources = _content(address, manifest.get("inputs", {}))
    if not sources:
        raise UserError(
            f"{address}: its licence is not known: {folder} states none, and nothing may be made from a source without "
            f"one. State it in the study (key license) and make it again with: snakemake {output_of(address)} -f"
        )
    found: Licences = {}
    for source in sources:
        path = manifest_of(Path(output_of(source)))
        found |= _licences(source, json_object_or_empty(path), path.parent)
    return found


def _content(address: str, inputs: Mapping[str, str]) -> list[str]:
    """The inputs that an artifact has its content from."""
    is_mix = address.startswith("data/mix/")
    return [source for source in inputs if not is_mix or source.startswith("data/dataset/")]
