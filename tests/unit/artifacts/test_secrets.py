"""What libraries say may hold secrets; what we print and keep may not."""

from pathlib import Path

import pytest

from llmfusion.artifacts import job as step
from llmfusion.errors import UserError, redacted


def test_values_of_secret_variables_and_passwords_in_addresses_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("aws_secret_access_key", "s3cr3t/s3cr3t")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one, and in every text
    monkeypatch.setenv("HOME", "/home/somebody")
    told = "401 for https://me:pw@hub.example/api with Bearer hf_abcdefgh, s3cr3t/s3cr3t, 1 try, /home/somebody, mail a@b.c"
    expected = "401 for https://<user>@hub.example/api with Bearer <HF_TOKEN>, <aws_secret_access_key>, 1 try, /home/somebody, mail a@b.c"
    assert redacted(told) == expected


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_failing_job_prints_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def build(job: step.Job) -> None:
        raise error("401 for a header with Bearer hf_abcdefgh")

    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", "--spec", "{}", "--out", "results/models/trained/x/manifest.json"])
    assert step.run("train", build) == 1
    said = capsys.readouterr()
    assert "hf_abcdefgh" not in said.out + said.err
    assert "Bearer <HF_TOKEN>" in said.err
