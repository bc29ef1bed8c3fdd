"""What the check of a study reads from the class of a fusion target; the targets here are changed for a test."""

from typing import Any

import pytest

from llmfusion.study.fusion_targets import target_class
from llmfusion.study.load import _parse, _valid_entries
from llmfusion.study.references import Declared, problems
from tests.unit.mini_study import small

PAIR = ["base/code", "base/math"]


def found(fusion: dict[str, Any], teachers: list[str], change: Any = lambda data: None) -> list[tuple[str, str]]:
    """Keys, within the entry, and texts of what is wrong with a training."""
    data = small()
    entry = {"init": "base/pivot", "mix": "student", "steps": 1, "lr": 0.1, "teachers": teachers, "fusion": fusion}
    data["models"]["trained"]["new"] = entry
    change(data)
    study, mistakes = _parse(data)
    assert mistakes == []
    prefix = "models.trained.new."
    keys = [(".".join(map(str, p.key)), p.text) for p in problems(Declared(data, _valid_entries(data, study)))]
    return sorted((key.removeprefix(prefix), text) for key, text in keys if key.startswith(prefix))


def math_with_its_own_tokenizer(data: dict[str, Any]) -> None:
    entry, pivot = data["models"]["base"]["math"], data["models"]["base"]["pivot"]
    del entry["init"]
    entry |= {key: pivot[key] for key in ("architecture", "tokenizer")}


def topk(data: dict[str, Any]) -> None:
    data["capture"] = {"kind": "topk", "k": 10}


def test_the_number_of_teachers_is_the_targets() -> None:
    assert found({"target": "kd"}, PAIR) == [
        ("fusion.target", "kd has one teacher, 2 are given; use mince, minilogit, naive or udf")
    ]
    assert found({"target": "udf"}, PAIR[:1]) == [("teachers", "udf needs two teachers or more, one is given; use kd")]
    assert found({"target": "kd"}, PAIR[:1]) == found({"target": "udf"}, PAIR) == []


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (1, 1, "naive has one teacher, 2 are given; use mince, minilogit or udf"),
        (3, None, "naive needs three teachers or more, 2 are given; use mince, minilogit or udf"),
        (5, 5, "naive needs 5 teachers, 2 are given; use mince, minilogit or udf"),
    ],
)
def test_other_numbers_are_told_in_words(
    monkeypatch: pytest.MonkeyPatch, least: int, most: int | None, text: str
) -> None:
    monkeypatch.setattr(target_class("naive"), "min_teachers", least)
    monkeypatch.setattr(target_class("naive"), "max_teachers", most)
    assert [message for _, message in found({"target": "naive"}, PAIR)] == [text]


def test_a_temperature_that_a_target_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = {"target": "naive", "temperature": 2.0}
    assert found(fusion, PAIR) == []
    monkeypatch.setattr(target_class("naive"), "accepts_temperature", False)
    assert found(fusion, PAIR) == [("fusion.temperature", "got 2.0; naive is defined at temperature 1 only")]
    assert found({"target": "naive"}, PAIR) == []


def test_teachers_of_another_vocabulary_are_refused_where_a_target_does_not_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert found({"target": "naive"}, PAIR, math_with_its_own_tokenizer) == []
    monkeypatch.setattr(target_class("naive"), "accepts_other_vocabularies", False)
    [(key, text)] = found({"target": "naive"}, PAIR, math_with_its_own_tokenizer)
    assert key == "teachers.1"
    assert text == "'base/math' has another vocabulary than 'base/pivot', which naive does not take"
    assert found({"target": "naive"}, PAIR) == []


@pytest.mark.parametrize("accepts", [True, False])
def test_the_pivot_is_a_teacher_where_a_target_takes_it(monkeypatch: pytest.MonkeyPatch, accepts: bool) -> None:
    def tokenizers(data: dict[str, Any]) -> None:
        assert "base/pivot" in data["mixes"]["student"]["tokenizers"]

    monkeypatch.setattr(target_class("naive"), "accepts_pivot", accepts)
    texts = [text for _, text in found({"target": "naive"}, ["base/pivot", "base/code"], tokenizers)]
    why = "'base/pivot' is the model this one starts from; a source must be another model"
    assert texts == ([] if accepts else [why])


def test_why_top_k_caches_are_not_enough_is_the_targets_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found({"target": "naive"}, PAIR, topk) == []
    monkeypatch.setattr(target_class("naive"), "topk_refusal", "sums tails")
    [(key, text)] = found({"target": "naive"}, PAIR, topk)
    assert key == "fusion.target"
    end = "capture.kind topk keeps the k most likely tokens. Use kind hidden or online"
    assert text == f"naive sums tails; {end}"
    whole = {"udf": "weighs teachers by their whole distributions", "minilogit": "compares the logits of all tokens"}
    for target, why in whole.items():
        assert found({"target": target}, PAIR, topk) == [("fusion.target", f"{target} {why}; {end}")]
