"""``llmfusion schema`` as a user types it."""

import json

import pytest

from llmfusion import ROOT
from llmfusion.cli.main import main


def test_the_schema_is_printed_as_committed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((ROOT / "config/schema.json").read_text())
