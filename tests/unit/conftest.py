"""Shared fixtures: a tokenizer trained on generated worlds and two-layer Llamas of width 16, made once a session."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.stand_ins import ARCHITECTURE, artifact, question

MIXED_LENGTHS = [
    *(question(f"s{i:02d}", f"What is {i} plus {2 * i}?", f"{i} + {2 * i} = {3 * i}\n#### {3 * i}") for i in range(20)),
    *(
        question(f"c{i:02d}", f"def f(x):\n    return x + {i}", "It adds " + " and ".join(["one"] * (i + 1)) + ".")
        for i in range(6)
    ),
    question(
        "twice", "Name the colour of the fep.", "red: A", "And its home?", "The fep lives in caves.", "Sure?", "Yes."
    ),
    {
        "id": "system",
        "domain": "general",
        "messages": [
            {"role": "system", "content": "Be brief."},
            *question("", "What does the dax eat?", "figs: B")["messages"],
        ],
    },
    {"id": "raw", "domain": "text", "text": "The dax is red. 3 + 4 = 7"},
]


def pytest_configure() -> None:
    """No test asks the network; set before any module that reads it at import."""
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )


@pytest.fixture(scope="session")
def samples() -> list[dict[str, Any]]:
    """Short and long, single and several turns, a system turn and a raw text."""
    return MIXED_LENGTHS


@pytest.fixture(scope="session")
def mix(tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, Any]]) -> Any:
    from llmfusion.io.jsonl import write_jsonl

    folder = tmp_path_factory.mktemp("mix")
    write_jsonl(folder / "samples.jsonl", samples)
    return artifact(folder, max_length=128, samples=len(samples))


@pytest.fixture(scope="session")
def tokenizer(mix: Any) -> Any:
    import torch

    from llmfusion.models.scratch import make_tokenizer
    from llmfusion.study.schema.base_models import Tokenizer

    torch.set_num_threads(1)
    return make_tokenizer(Tokenizer(vocabulary_size=300), mix.file("samples.jsonl"), None)


def _checkpoint(folder: Path, tokenizer: Any, seed: int, dtype: str = "float32", **shape: Any) -> Any:
    from llmfusion.models.loading import save_model
    from llmfusion.models.scratch import make_model
    from llmfusion.study.schema.base_models import Architecture

    model = make_model(Architecture(**{**ARCHITECTURE, **shape}), tokenizer, seed)
    return artifact(folder, **save_model(model, tokenizer, folder, dtype))


@pytest.fixture(scope="session")
def pivot(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    return _checkpoint(tmp_path_factory.mktemp("pivot"), tokenizer, 1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Same vocabulary as the pivot, wider."""
    return _checkpoint(tmp_path_factory.mktemp("teacher"), tokenizer, 2, hidden_size=24)


@pytest.fixture(scope="session")
def tied_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    return _checkpoint(tmp_path_factory.mktemp("tied"), tokenizer, 3, tie_word_embeddings=True)


def _cache(folder: Path, teacher: Any, mix: Any, dtype: str = "float32") -> Any:
    from llmfusion.study.schema.settings import Capture
    from llmfusion.teachers.capture import capture

    facts = capture(teacher, mix, folder, Capture(dtype=dtype, batch_size=7), None)
    return artifact(folder, **facts)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Any, mix: Any) -> Any:
    return _cache(tmp_path_factory.mktemp("cache"), teacher, mix)


@pytest.fixture(scope="session")
def tied_cache(tmp_path_factory: pytest.TempPathFactory, tied_teacher: Any, mix: Any) -> Any:
    return _cache(tmp_path_factory.mktemp("tied-cache"), tied_teacher, mix)
