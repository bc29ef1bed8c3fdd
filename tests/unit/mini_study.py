"""The miniature study as text, as data and with mistakes put in; shared by the tests of the config modules."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.study import strict_yaml
from llmfusion.study.errors import StudyError
from llmfusion.study.load import read_study
from llmfusion.study.schema.study import Study

MINI = ROOT / "tests" / "unit" / "study.yaml"  # a study of its own: what the project ships may grow


@cache
def _small() -> str:
    data, _ = strict_yaml.load(MINI)
    data = {key: value for key, value in data.items() if not key.startswith("x-")}
    keep = ["text-facts", "chat-code", "noisy-code"]
    data["datasets"] = {name: data["datasets"][name] for name in keep}
    data["mixes"] = {
        "raw": {"datasets": {"text-facts": 5}, "max_length": 128},
        "code": {"datasets": {"chat-code": 5}, "max_length": 128},
        "student": {
            "datasets": {"noisy-code": 5},
            "max_length": 128,
            "tokenizers": ["base/pivot", "base/code", "base/math"],
            "against": ["mmlu"],
        },
    }
    data["models"]["base"]["math"]["mix"] = "code"
    return json.dumps(data)


def small() -> dict[str, Any]:
    """The miniature study with three data sets: every kind of entry, read in milliseconds. A new copy each time."""
    return json.loads(_small())


def small_study(change: Callable[[dict[str, Any]], object] = lambda data: None) -> Study:
    """The small study after ``change``, without files and cross-checks."""
    data = small()
    change(data)
    return Study.model_validate(data)


def write(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(folder: Path, text: str) -> str:
    """The message with which a study of this text is refused."""
    with pytest.raises(StudyError) as caught:
        read_study(write(folder, text))
    return str(caught.value)
