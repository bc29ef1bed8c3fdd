import json
from pathlib import Path

import pytest

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.models.vocabularies import require_declared_vocabularies


def model(word: str | None, sha256: str) -> Artifact:
    spec = {"base": {"kind": "scratch"} if word is None else {"kind": "path", "vocabulary": word}}
    return Artifact(Path(), {"spec": json.dumps(spec), "facts": {"vocabulary_sha256": sha256}}, "0" * 64)


def test_models_of_one_word_must_share_their_tokenizer_and_others_need_not() -> None:
    models = {
        "models/base/a": model("x", "1"),
        "models/base/b": model("x", "1"),
        "models/base/c": model("y", "2"),
        "models/base/d": model(None, "3"),
    }
    require_declared_vocabularies(models)
    with pytest.raises(UserError, match=r"models/base/e and models/base/a both say vocabulary 'x' in the study, but"):
        require_declared_vocabularies({**models, "models/base/e": model("x", "2")})
