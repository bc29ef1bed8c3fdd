"""Licences through the steps of a small study: every one behind an artifact is listed, and no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts.licences import inherited, licence_lines, licences_of
from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError

LICENCES = {
    "models/base/pivot": "llama3.1",
    "models/base/gemma": "gemma",
    "models/base/other": "apache-2.0",
    "data/dataset/chat": "cc-by-4.0",
    "data/dataset/code": "mit",
    "data/dataset/unused": "proprietary",
    "data/tasks/gsm8k": "cc-by-nc-4.0",
}
MADE_FROM = {
    "data/mix/m": ["data/dataset/chat", "data/dataset/code", "models/base/other", "data/tasks/gsm8k"],
    "data/mix/n": ["data/dataset/code", "models/base/pivot"],
    "data/generated/base/gemma/m": ["models/base/gemma", "data/mix/m"],
    "teachers/base/gemma/n": ["models/base/gemma", "data/mix/n"],
    "models/trained/sft": ["models/base/pivot", "data/mix/n"],
    "models/trained/seqkd": ["models/base/pivot", "data/mix/m", "data/generated/base/gemma/m"],
    "models/trained/kd": ["models/trained/sft", "data/mix/n", "teachers/base/gemma/n"],
    "models/merged/both": ["models/base/pivot", "models/trained/kd", "models/trained/seqkd"],
}
EXPECTED = {
    "data/mix/m": {"cc-by-4.0", "mit"},  # not those of the tokenizers and tests that its samples are compared with
    "data/mix/n": {"mit"},
    "data/generated/base/gemma/m": {"gemma", "cc-by-4.0", "mit"},
    "teachers/base/gemma/n": {"gemma", "mit"},
    "models/trained/sft": {"llama3.1", "mit"},
    "models/trained/seqkd": {"llama3.1", "gemma", "cc-by-4.0", "mit"},
    "models/trained/kd": {"llama3.1", "gemma", "mit"},
    "models/merged/both": {"llama3.1", "gemma", "cc-by-4.0", "mit"},
}


def made(address: str, license: Any = None) -> Artifact:
    """An artifact as the store reads it."""
    facts = {} if license is None else {"license": license}
    inputs = dict.fromkeys(MADE_FROM.get(address, ()), "0" * 64)
    return Artifact(Path(f"results/{address}"), {"address": address, "inputs": inputs, "facts": facts}, "0" * 64)


def all_made() -> dict[str, Artifact]:
    """Every artifact, as its step gives it the licences of what it takes its content from."""
    out = {address: made(address, licence) for address, licence in LICENCES.items()}
    for address, sources in MADE_FROM.items():
        content = [s for s in sources if not address.startswith("data/mix/") or s.startswith("data/dataset/")]
        out[address] = made(address, inherited({source: out[source] for source in content}))
    return out


@pytest.mark.parametrize("address", EXPECTED)
def test_every_licence_behind_an_artifact_is_listed_with_its_source_and_no_other(address: str) -> None:
    found = licences_of(address, all_made()[address])
    assert set(found.values()) == EXPECTED[address]
    assert all(LICENCES[source] == licence for source, licence in found.items())


@pytest.mark.parametrize("address", EXPECTED)
def test_what_was_made_before_licences_were_inherited_is_followed_to_its_sources(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {address: made(address, licence) for address, licence in LICENCES.items()}
    before |= {a: made(a, ["llama3.1"] if a.startswith("models/trained") else None) for a in MADE_FROM}
    for one in before.values():
        one.folder.mkdir(parents=True)
        (one.folder / "manifest.json").write_text(json.dumps(one.manifest))
    assert set(licences_of(address, before[address]).values()) == EXPECTED[address]


@pytest.mark.parametrize("stated", [None, "", "  ", []])
def test_a_source_without_a_licence_is_refused_with_what_to_do(stated: Any) -> None:
    with pytest.raises(UserError, match=r"models/base/x: its licence is not known: .* \(key license\)") as error:
        inherited(
            {"data/dataset/chat": made("data/dataset/chat", "mit"), "models/base/x": made("models/base/x", stated)}
        )
    assert "snakemake results/models/base/x/manifest.json -f" in str(error.value)


def test_a_card_groups_sources_by_licence() -> None:
    licences = {"models/base/b": "mit", "data/dataset/c": "mit", "models/base/a": "gemma"}
    assert licence_lines(licences) == ["- gemma: base/a", "- mit: base/b, dataset/c"]
