"""Model cards name every way of training there is."""

from pathlib import Path
from typing import Any

import pytest

from llmfusion.study.fusion_targets import target_class, target_names
from llmfusion.study.schema.training import TrainedModel
from llmfusion.training.card import write_training_card

FACTS = {"samples": 1500, "steps": 20, "loss": 0.25}


def card(folder: Path, **keys: Any) -> str:
    """The card of a training with these keys."""
    run = TrainedModel.model_validate({"init": "base/pivot", "mix": "m", "steps": 20, "lr": 1e-3, **keys})
    write_training_card(folder, run, FACTS, ["chat"], ["- mit: base/pivot"])
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_its_title_on_the_card(tmp_path: Path, name: str) -> None:
    text = card(tmp_path, teachers=["base/code"], fusion={"target": name, "lambda": 0.3})
    assert f"tags: [{name}, llm-fusion-workflow]" in text
    assert f"\n{target_class(name).title}, trained with llm-fusion-workflow after InfiFusion" in text
    assert f"- fusion.lambda: 0.3\n- fusion.target: {name}\n- lr: 0.001\n- steps: 20\n" in text


def test_trainings_without_teachers_have_theirs(tmp_path: Path) -> None:
    assert "\nSupervised fine-tuning, trained with" in card(tmp_path)
    text = card(tmp_path, generated=["base/code"])
    assert "tags: [seqkd, llm-fusion-workflow]" in text
    assert "\nSequence-level distillation (SeqKD), trained with" in text
    assert "- answers to it that were trained on as well: base/code's" in text
