"""Folders for children to train in, and what the undisturbed training makes."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llmfusion.artifacts.store import Draft, draft_folder, publish
from llmfusion.study.addresses import output_of
from llmfusion.study.schema.base_models import ScratchModel
from tests.e2e.kills.child import MIX, MODEL, TRAINING, Undisturbed, files_of, train
from tests.unit.stand_ins import question


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives fresh folders with a mix in them; loads, and uses once, what the children need."""
    from llmfusion.data.chat import encode
    from llmfusion.io.jsonl import write_jsonl
    from llmfusion.models.loading import save_model
    from llmfusion.models.scratch import make_model, make_tokenizer

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("boundaries")
    output = root / "mix" / output_of(MIX)
    draft = Draft(MIX, "{}", {}, draft_folder(output, "token"), {"max_length": 128, "samples": 16, "license": "mit"})
    draft.folder.mkdir(parents=True)
    samples = [question(f"q{i}", f"What is {i} plus {2 * i}?", f"{3 * i}" + " is it" * (i % 5)) for i in range(16)]
    write_jsonl(draft.folder / "samples.jsonl", samples)
    options = ScratchModel.model_validate(TRAINING)
    tokenizer = make_tokenizer(options.tokenizer, draft.folder / "samples.jsonl", None)
    model = make_model(options.architecture, tokenizer, 1)
    with torch.no_grad():
        model(torch.tensor([encode(samples[0], tokenizer, 128).ids]))  # type: ignore[union-attr]
    save_model(model, tokenizer, root / "warm", "float32")
    publish(draft, output, {})

    def fresh(name: str) -> Path:
        return shutil.copytree(root / "mix", root / name)

    return fresh


@pytest.fixture(scope="session")
def whole(start: Callable[[str], Path]) -> Undisturbed:
    """The training without any disturbance."""
    place = start("whole")
    ended = train(place)
    assert ended.status == 0, ended.output
    return Undisturbed(**asdict(ended), model=files_of(place, MODEL))
