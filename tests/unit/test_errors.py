"""How mistakes are told: nearest names, order, paths without pydantic's union tags."""

import pytest
from pydantic import ValidationError

from llmfusion.errors import DamagedError, UserError
from llmfusion.study.errors import Problem, StudyError, from_pydantic, nearest, report
from llmfusion.study.schema.study import Study
from tests.unit.mini_study import small


def told(data: dict) -> dict[tuple, str]:
    with pytest.raises(ValidationError) as caught:
        Study.model_validate(data)
    problems = from_pydantic(caught.value, data, Study.model_json_schema())
    return {p.key: p.text for p in problems}


def test_nearest_names_a_close_one_or_lists_them() -> None:
    assert nearest("steqs", ["lr", "steps"]) == "did you mean 'steps'?"
    assert nearest("zzz", ["b", "a"]) == "there are: a, b"
    assert nearest("zzz", []) == "there are none"
    assert nearest("zzz", [f"n{i:02}" for i in range(15)]).endswith("n11, ... (15 in all)")


def test_report_sorts_by_line_drops_repeats_and_falls_back_to_the_parents_line() -> None:
    problems = [
        Problem(("b", 0, "absent"), "late"),
        Problem(("a",), "early"),
        Problem(("a",), "early"),
        Problem((), "no key"),
    ]
    text = report("s.yaml", problems, {("a",): 2, ("b",): 5, ("b", 0): 6})
    assert text.splitlines() == [
        "s.yaml: 3 mistakes; nothing was started",
        "  s.yaml:1: no key",
        "  s.yaml:2: a: early",
        "  s.yaml:6: b[0].absent: late",
    ]
    assert report("s.yaml", problems[:1], {}).splitlines()[0] == "s.yaml: 1 mistake; nothing was started"


@pytest.mark.parametrize("left_out", ["path", "license", "vocabulary"])
def test_a_path_models_missing_key_is_named_although_its_kind_is_called_path_too(left_out: str) -> None:
    data = small()
    entry = {"kind": "path", "path": "models/x", "vocabulary": "x", "license": "mit"}
    del entry[left_out]
    data["models"]["base"]["own"] = entry
    assert told(data) == {("models", "base", "own", left_out): "is missing"}


def test_a_path_models_faulty_path_and_unknown_key_keep_their_own_places() -> None:
    data = small()
    data["models"]["base"]["own"] = {"kind": "path", "path": 5, "vocabulary": "x", "license": "mit", "licence": "mit"}
    assert told(data) == {
        ("models", "base", "own", "path"): "got 5 (int); expected a valid string",
        ("models", "base", "own", "licence"): "unknown key; did you mean 'license'?",
    }


def test_a_rule_over_several_keys_is_told_at_the_entry_itself() -> None:
    data = small()
    data["models"]["base"]["pivot"]["init"] = "base/code"
    assert told(data) == {("models", "base", "pivot"): "give either init, or architecture and tokenizer"}


def test_an_entry_without_its_kind_or_that_is_no_mapping_says_so() -> None:
    data = small()
    del data["datasets"]["text-facts"]["kind"]
    data["models"]["merged"]["ta-homogeneous"] = "ta"
    assert told(data) == {
        ("datasets", "text-facts", "kind"): "is missing",
        ("models", "merged", "ta-homogeneous"): "got 'ta' (str); expected a mapping of keys",
    }


def test_bad_names_say_what_a_name_is_made_of() -> None:
    data = small()
    data["batches"]["Two Words"] = ["mmlu"]
    ((key, text),) = told(data).items()
    assert key == ("batches", "Two Words")
    assert "lower-case letters" in text


def test_long_values_are_shown_shortened() -> None:
    data = small()
    data["scale"] = "x" * 500
    assert len(told(data)["scale",]) < 120


def test_no_message_holds_what_a_terminal_obeys() -> None:
    text = "models/\x1b]0;x\x07\r\u202e\udcff:\n\tlines and größe 模型 stay"
    for error in (UserError, DamagedError, StudyError):
        assert str(error(text)) == "models/?]0;x????:\n\tlines and größe 模型 stay"
