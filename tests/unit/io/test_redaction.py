"""Secrets are found in every spelling that libraries give them, and nothing else is."""

import base64
import json
import random
import string
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from llmfusion.io.redaction import redacted

PASSWORDS = ("s3cr3t-pass", "p@ss:w/rd?#1", "täglich %41 & 'x\"\\", "abcd", "+/+/+/+/", "two words")


@pytest.fixture(autouse=True)
def _no_secrets_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_values_of_secret_variables_and_passwords_in_addresses_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("aws_secret_access_key", "s3cr3t/s3cr3t")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one, and in every text
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/somebody/token")  # where it lies is no secret
    monkeypatch.setenv("HOME", "/home/somebody")
    text = "401 for https://me:pw@hub.example/api with Bearer hf_abcdefgh, s3cr3t/s3cr3t, 1 try, /home/somebody/token"
    expected = "401 for https://<user>@hub.example/api with Bearer <HF_TOKEN>, <aws_secret_access_key>, 1 try"
    assert redacted(f"{text}, mail a@b.c") == f"{expected}, /home/somebody/token, mail a@b.c"


def spellings(password: str) -> dict[str, str]:
    """The password as libraries print it, by their names."""
    header = f"me:{password}"
    return {
        "plain": password,
        "encoded": quote(password, safe=""),
        "encoded in part": quote(password),
        "encoded in lower case": quote(password, safe="").lower() if password.islower() else quote(password, safe=""),
        "encoded twice": quote(quote(password, safe=""), safe=""),
        "of a form": quote_plus(password),
        "repr": repr(password)[1:-1],
        "json": json.dumps(password)[1:-1],
        "repr of a repr": repr(repr(password))[2:-2],
        "basic": base64.b64encode(header.encode()).decode(),
        "basic, safe in addresses": base64.urlsafe_b64encode(header.encode()).decode(),
        "basic, encoded": quote(base64.b64encode(header.encode()).decode(), safe="+/"),
        "of another user": base64.b64encode(f"other:{password}".encode()).decode(),
        "of a third user": base64.b64encode(f"him:{password}".encode()).decode(),
        "base64": base64.b64encode(password.encode()).decode(),
    }


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "https_proxy"])
def test_a_password_in_an_address_is_found_in_every_spelling(monkeypatch, password, variable) -> None:
    monkeypatch.setenv(variable, f"https://me:{quote(password, safe='')}@hub.example:8443/hub")
    for name, spelling in spellings(password).items():
        found = redacted(f"before, {spelling}, after")
        assert spelling not in found, name
        assert found.startswith("before, "), name
        assert found.endswith(", after"), name
        assert "<password in " in found, name
    address = f"https://me:{quote(password, safe='')}@hub.example:8443/hub/api"
    assert redacted(f"GET {address}") == "GET https://<user>@hub.example:8443/hub/api"


def test_random_passwords_are_found_behind_users_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    for _ in range(200):
        password = "".join(rng.choices(string.printable.strip(), k=rng.randint(6, 20)))
        monkeypatch.setenv("HF_ENDPOINT", f"https://me:{quote(password, safe='')}@hub.example")
        user = "u" * rng.randint(0, 9)
        for text in (base64.b64encode(f"{user}:{password}".encode()).decode(), *spellings(password).values()):
            found = redacted(text)
            assert text not in found
            assert "<password in HF_ENDPOINT>" in found


@pytest.mark.parametrize(
    ("address", "printed"),
    [
        ("https://me:pa/ssw0rds@hub.example", "Port could not be cast to integer value as 'ssw0rds'"),
        ("https://me:pa#ss/word1@hub.example", "no host in me:pa, path /word1"),
        ("https://me:p@ssw0rd@hub.example", "tried me:p@ssw0rd"),
        ("http://a:first1@one http://b:second2@two", "first1 and second2"),
        ("https://t0ken-alone@hub.example", "a header with t0ken-alone"),
    ],
)
def test_addresses_that_are_written_otherwise_than_they_should_be_have_passwords_too(
    monkeypatch, address, printed
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    found = redacted(printed)
    for word in ("ssw0rd", "word1", "first1", "second2", "t0ken-alone"):
        assert word not in found


def test_short_passwords_are_taken_out_where_they_stand_with_their_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pw@hub.example")
    basic = base64.b64encode(b"me:pw").decode()
    assert basic not in redacted(f"Authorization: Basic {basic}")
    assert redacted("ftp://me:pw@x, https://a:b@c@d, pw") == "ftp://<user>@x, https://<user>@d, pw"


@pytest.mark.parametrize(
    "value", ["https://hub.example:8443/@scope/x", "https://hub.example/a?mail=me@x.org", "git@host:a/b", "8080/@me"]
)
def test_addresses_without_a_password_hide_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    text = "https://hub.example:8443/@scope/x 8443/ hub.example /@scope mail=me me@x.org git@host:a/b step 3 of 8080"
    assert redacted(text) == text


def test_the_stored_token_is_a_secret_wherever_it_is_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored12345\n")
    assert redacted("Bearer hf_stored12345") == "Bearer <stored token>"
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", "/changed")  # tokens are read again where the environment is another
    (tmp_path / "elsewhere").write_text("hf_other123456")
    assert redacted("hf_other123456 hf_stored12345") == "<stored token> hf_stored12345"


def test_lines_of_a_private_key_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_PRIVATE_KEY", "-----BEGIN KEY-----\nAAAAB3NzaC1yc2E\n-----END KEY-----")
    assert redacted("read AAAAB3NzaC1yc2E") == "read <SSH_PRIVATE_KEY>"


def test_long_texts_take_no_time_that_grows_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of base64 digits on one line: it would take hours where each digit begins a search to the end."""
    monkeypatch.setenv("HF_ENDPOINT", "https://me:s3cr3t-pass@hub.example")
    text = "QUJD" * 250_000 + base64.b64encode(b"me:s3cr3t-pass").decode()
    assert redacted(text) == "QUJD" * 250_000 + "<password in HF_ENDPOINT>"
    assert len(redacted("://" * 100_000)) == 300_000
    assert len(redacted("%25" * 100_000)) == 300_000
