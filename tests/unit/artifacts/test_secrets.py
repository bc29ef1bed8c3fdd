"""What libraries say may hold secrets; what we print, log and keep may not."""

import logging
from pathlib import Path

import pytest

from llmfusion.artifacts.job import Job
from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.io.logs import RedactedRecord

SPEC = ["--spec", "{}", "--out", "results/models/trained/x/manifest.json"]


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a step with this ``build``, a token in the environment."""

    def step(build) -> int:
        monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("llmfusion.steps.score.build", build)
        monkeypatch.setattr("sys.argv", ["llmfusion", "step", "score", *SPEC])
        return main()

    return step


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_failing_job_prints_no_secret(step, capsys: pytest.CaptureFixture[str], error: type[Exception]) -> None:
    def build(job: Job) -> None:
        raise error("401 for a header with Bearer hf_abcdefgh")

    assert step(build) == 1
    printed = capsys.readouterr()
    assert "hf_abcdefgh" not in printed.out + printed.err
    assert "Bearer <HF_TOKEN>" in printed.err


def test_log_lines_of_any_library_hold_no_secret(step, capsys: pytest.CaptureFixture[str]) -> None:
    own_handler = logging.getLogger("library.with.a.handler")
    own_handler.propagate = False

    def build(job: Job) -> None:
        own_handler.addHandler(logging.StreamHandler())
        own_handler.warning("retrying with %s", "hf_abcdefgh")
        logging.getLogger("library").warning("asked https://me:pw@hub.example with %s", "hf_abcdefgh")
        logging.getLogger("llmfusion.steps").info("token hf_abcdefgh")
        try:
            raise ValueError("refused: hf_abcdefgh")
        except ValueError:
            logging.getLogger("library").exception("failed")

    assert step(build) == 0
    printed = capsys.readouterr()
    assert "hf_abcdefgh" not in printed.out + printed.err
    assert printed.err == "retrying with <HF_TOKEN>\n"
    assert "asked https://<user>@hub.example with <HF_TOKEN>\ntoken <HF_TOKEN>\nfailed\nTraceback" in printed.out
    assert "ValueError: refused: <HF_TOKEN>" in printed.out


def test_what_other_libraries_say_below_a_warning_stays_out_of_the_log(
    step, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(job: Job) -> None:
        logging.getLogger("httpx").info("HTTP Request: GET")
        logging.getLogger("llmfusion.data").debug("details")
        logging.getLogger("llmfusion.data").info("5 samples")

    assert step(build) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["5 samples"]


def test_a_record_without_arguments_or_error_is_left_as_it_is() -> None:
    record = RedactedRecord("name", logging.INFO, "file.py", 1, "100 % of 5", (), None)
    assert record.getMessage() == "100 % of 5"
    assert record.exc_text is None
