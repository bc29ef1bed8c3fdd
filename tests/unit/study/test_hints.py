"""Hints: what a study may ask for, but a user should know of."""

from typing import Any

import pytest

from llmfusion.cli.main import main
from llmfusion.study.hints import hints
from tests.unit.mini_study import MINI, small_study, write


def other_vocabulary(steps: int) -> Any:
    """A change of the small study: the teacher of kd-code gets another vocabulary, and projectors so many steps."""

    def change(data: dict[str, Any]) -> None:
        data["models"]["base"]["code"] = {"kind": "path", "path": "x", "vocabulary": "x", "license": "mit"}
        data["models"]["trained"]["kd-code"]["fusion"]["projector_steps"] = steps

    return change


def test_a_study_of_one_vocabulary_has_no_hints() -> None:
    assert hints(small_study()) == []


def test_projectors_that_start_untrained_are_hinted_at_with_what_to_set() -> None:
    [hint] = hints(small_study(other_vocabulary(0)))
    assert hint.startswith("trained/kd-code: projectors of teachers with another vocabulary (base/code) start with")
    assert "fusion.projector_steps: 100 or more" in hint


def test_projectors_that_are_trained_beforehand_are_not() -> None:
    assert hints(small_study(other_vocabulary(1))) == []


def test_check_prints_hints_behind_its_verdict_and_still_accepts(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "    code: {<<: *base, init: base/pivot, mix: code, steps: 600, lr: 5e-3, lr_min: 2.5e-4}\n"
    text = MINI.read_text()
    assert code in text
    other = "    code: {kind: path, path: my-models/code, vocabulary: other, license: mit}\n"
    assert main(["check", str(write(tmp_path, text.replace(code, other)))]) == 0
    verdict, note = capsys.readouterr().out.splitlines()
    assert verdict.endswith("no mistakes")
    assert ": note: trained/kd-code: projectors of teachers with another vocabulary (base/code)" in note
