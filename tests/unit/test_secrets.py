"""What libraries say may hold secrets; what we print and keep may not."""

import pytest

from llmfusion.errors import redacted


def test_values_of_secret_variables_and_passwords_in_addresses_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("aws_secret_access_key", "s3cr3t/s3cr3t")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one, and in every text
    monkeypatch.setenv("HOME", "/home/somebody")
    told = "401 for https://me:pw@hub.example/api with Bearer hf_abcdefgh, s3cr3t/s3cr3t, 1 try, /home/somebody, mail a@b.c"
    expected = "401 for https://<user>@hub.example/api with Bearer <HF_TOKEN>, <aws_secret_access_key>, 1 try, /home/somebody, mail a@b.c"
    assert redacted(told) == expected
