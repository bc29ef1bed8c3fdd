"""Models for which a study gives the same word under ``vocabulary`` share one tokenizer."""

from collections.abc import Mapping

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError


def require_declared_vocabularies(models: Mapping[str, Artifact]) -> None:
    """Raise :class:`UserError` where two staged models (by address) have the same word and other tokenizers."""
    first: dict[str, tuple[str, str]] = {}
    for address, artifact in models.items():
        word = artifact.spec.get("base", {}).get("vocabulary")
        if word is None:
            continue
        sha256 = artifact.facts["vocabulary_sha256"]
        other, expected = first.setdefault(word, (address, sha256))
        if sha256 != expected:
            raise UserError(
                f"{address} and {other} both say vocabulary {word!r} in the study, but their tokenizers differ; "
                "give them different words (llmfusion check names the lines)"
            )
