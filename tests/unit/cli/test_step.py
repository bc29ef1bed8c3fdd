"""``llmfusion step``: which steps there are, and that a light one starts without the heavy libraries."""

import re
import subprocess
import sys
from importlib import import_module

import pytest

from llmfusion import ROOT
from llmfusion.cli.main import main
from llmfusion.cli.step import STEPS

LOADED = """
import sys
import llmfusion.artifacts.job, llmfusion.cli.step
from importlib import import_module
import_module(f"llmfusion.steps.{sys.argv[1]}")
print(*(name for name in ("torch", "numba", "pandas", "transformers") if name in sys.modules))
"""


def test_there_is_a_step_a_rule_and_each_can_be_imported() -> None:
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    assert set(re.findall(r"llmfusion step (\w+) ", rules)) == set(STEPS)
    for name in STEPS:
        assert callable(import_module(f"llmfusion.steps.{name}").build)


@pytest.mark.parametrize(
    ("step", "heavy"), [("score", ""), ("table", "pandas"), ("mix_samples", ""), ("stage_tasks", "")]
)
def test_a_light_step_loads_no_more_than_it_needs(step: str, heavy: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, step], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == heavy


def test_an_unknown_step_is_a_mistake_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["step", "socre", "--spec", "{}", "--out", "results/scores/base/p/t.json"])
    assert caught.value.code == 2
    assert "invalid choice: 'socre'" in capsys.readouterr().err
