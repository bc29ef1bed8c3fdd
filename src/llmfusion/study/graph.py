"""From a study to its artifacts: for each one its address, its inputs and its spec.

The spec is canonical JSON (sorted keys, defaults left out) and all a program needs besides its inputs, so the log
line of a job reproduces the artifact. ``recipe`` is raised when a step's meaning changes. A fingerprint is the hash
of a spec and of its inputs' fingerprints: it says what was asked for, before anything has been computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfusion import ROOT
from llmfusion.io.digests import canonical, fingerprint_of
from llmfusion.study.addresses import output_of
from llmfusion.study.kinds import all_kinds, kind_of, wildcards_of

if TYPE_CHECKING:
    from llmfusion.study.schema.study import Study


@dataclass(frozen=True)
class PlannedArtifact:
    """One artifact that the study can make."""

    inputs: list[str]  # files that its job needs
    spec: str  # canonical JSON
    fingerprint: str  # hash of the spec and of the inputs' fingerprints
    shards: list[str]  # addresses of jobs that do its work beforehand: it waits for them, but is the same without them


class ArtifactGraph:
    """All artifacts of a study by address (``artifacts``)."""

    def __init__(self, study: Study):
        self.study = study
        self.artifacts: dict[str, PlannedArtifact] = {}
        self.chat_template = {} if study.chat_template == "neutral" else {"chat_template": study.chat_template}

    def add_artifact(self, address: str) -> PlannedArtifact:
        """Enter an artifact, and first everything that it is made from. Its kind says what that is."""
        if address not in self.artifacts:
            kind = kind_of(address)
            declared = kind.declare(self, **wildcards_of(address))
            inputs = list(dict.fromkeys(declared.inputs))
            fingerprints = [self.fingerprint(source) for source in inputs]
            for shard in declared.shards:
                self.add_artifact(shard)
            outside = [str(ROOT / file) for file in declared.files]
            files = [*map(output_of, inputs), *outside, *map(output_of, declared.shards)]
            spec = self._spec(kind.step, kind.recipe, declared.body)
            fingerprint = fingerprint_of(spec, fingerprints)
            self.artifacts[address] = PlannedArtifact(files, spec, fingerprint, declared.shards)
        return self.artifacts[address]

    def fingerprint(self, address: str) -> str:
        """Fingerprint of an artifact, which is entered if it is not there yet."""
        return self.add_artifact(address).fingerprint

    def shards_made(
        self, address: str, step: str, recipe: int, body: dict[str, Any], inputs: Sequence[str]
    ) -> int | None:
        """In how many shards an artifact was made that is there as the study asks for it; None where it is not.

        Asking for another number of shards then does not make it again.
        """
        spec = self._spec(step, recipe, body)
        fingerprint = fingerprint_of(spec, [self.fingerprint(source) for source in inputs])
        output = ROOT / self.study.directory / output_of(address)
        try:
            if json.loads(output.read_bytes())["fingerprint"] != fingerprint:
                return None
            return max(1, len(json.loads(output.with_name("provenance.json").read_bytes())["shards"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def _spec(step: str, recipe: int, body: dict[str, Any]) -> str:
        return canonical({"step": step, "recipe": recipe, **body})


def build_graph(study: Study) -> ArtifactGraph:
    """Every artifact the study can make: all data and models, the caches its runs use, every model on every task."""
    graph = ArtifactGraph(study)
    for kind in all_kinds().values():
        for address in kind.wanted(study):
            graph.add_artifact(address)
    return graph
