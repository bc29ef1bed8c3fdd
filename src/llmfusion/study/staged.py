"""Checks that need what is on disk: datasets too small for a mix, tokenizers that differ where one is declared."""

import base64
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.io.files import json_object_or_empty
from llmfusion.study.addresses import manifest_of, output_of
from llmfusion.study.errors import Key, Problem
from llmfusion.study.graph import ArtifactGraph
from llmfusion.study.load import refusal
from llmfusion.study.schema.study import Study


def check_staged(file: str | Path, study: Study, graph: ArtifactGraph) -> None:
    """Compare the study with the manifests that exist. Raises :class:`StudyError` with all mistakes, by line."""
    facts = _Facts(study, graph)
    problems = [*_too_few_rows(study, facts), *_tokenizers(study, facts), *_orphans(facts)]
    if problems:
        raise refusal(file, problems)


class _Facts:
    """Facts in manifests of the study's own artifacts (others are left alone: they will be made again)."""

    def __init__(self, study: Study, graph: ArtifactGraph):
        self.directory = ROOT / study.directory
        self.graph = graph

    def __call__(self, address: str) -> dict[str, Any]:
        manifest = json_object_or_empty(manifest_of(self.directory / output_of(address)))
        same = manifest.get("fingerprint") == self.graph.artifacts[address].fingerprint
        return manifest.get("facts", {}) if same else {}


def _too_few_rows(study: Study, facts: _Facts) -> list[Problem]:
    out = []
    for name, mix in study.mixes.items():
        for dataset, count in mix.datasets.items():
            rows = facts(f"data/dataset/{dataset}").get("samples")
            if rows is not None and isinstance(count, int) and rows < count:
                text = f"asks for {count} samples; the dataset staged has {rows}"
                out.append(Problem(("mixes", name, "datasets", dataset), text))
    return out


def _tokenizers(study: Study, facts: _Facts) -> list[Problem]:
    first: dict[str, tuple[str, str]] = {}
    out = []
    for name, entry in study.models.base.items():
        vocabulary = getattr(entry, "vocabulary", None)
        sha256 = facts(f"models/base/{name}").get("vocabulary_sha256")
        if vocabulary is None or sha256 is None:
            continue
        other, expected = first.setdefault(vocabulary, (name, sha256))
        if sha256 != expected:
            models = f"base/{name} and base/{other} both say vocabulary {vocabulary!r}"
            sizes = " and ".join(_described(facts, one) for one in (name, other))
            text = f"{models}, but their tokenizers differ: {sizes}; give them different words"
            out.append(Problem(("models", "base", name, "vocabulary"), text))
    return out


def _described(facts: "_Facts", base: str) -> str:
    """A base model with the size that its manifest says: ``base/pivot (135M parameters, 49,152 tokens)``."""
    known = facts(f"models/base/{base}")
    parameters = known.get("parameters")
    tokens = known.get("tokenizer_size")
    sizes = [f"{parameters / 1e6:,.0f}M parameters"] if isinstance(parameters, int) else []
    sizes += [f"{tokens:,} tokens"] if isinstance(tokens, int) else []
    return f"base/{base}" + (f" ({', '.join(sizes)})" if sizes else "")


def _orphans(facts: _Facts) -> list[Problem]:
    """Artifacts of other settings that Snakemake would keep: it was killed before it recorded how they were made."""
    out = []
    for address, artifact in facts.graph.artifacts.items():
        path = output_of(address)
        name = base64.b64encode(path.encode()).decode()  # of Snakemake's record; a longer name is split into folders
        state = facts.directory / ".snakemake"
        unknown = (state / "incomplete" / name).exists() or not (state / "metadata" / name).exists()
        if len(name) > 255 or not unknown or not (facts.directory / path).exists():
            continue
        manifest = json_object_or_empty(manifest_of(facts.directory / path))
        if manifest.get("spec") not in (None, artifact.spec):
            settings = f"{address} lies in {facts.directory} with other settings than this study's"
            record = "Snakemake has no record of how it was made (it was killed, perhaps)"
            key: Key = tuple(address.split("/")) if address.startswith("models/") else ()
            out.append(Problem(key, f"{settings}, and {record}; remove {path} to have it made again"))
    return out
