"""The console script: its commands, its completion by the shell, and how soon it starts."""

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llmfusion import ROOT, __version__
from llmfusion.cli.main import COMMANDS, main
from llmfusion.errors import UserError

PROGRAM = [sys.executable, "-m", "llmfusion"]


def test_without_a_command_the_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(f"\n    {name}  " in text or f"\n    {name}\n" in text for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    module = import_module(f"llmfusion.cli.{command}")
    assert (module.__doc__ or "").split("\n")[0] in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"llmfusion {__version__}\n")


def test_a_mistake_that_a_command_does_not_expect_is_one_line_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise UserError("cannot read https://me:pw@hub.example")

    monkeypatch.setattr("llmfusion.cli.schema.run", run)
    assert main(["schema"]) == 1
    assert capsys.readouterr().err == "error: cannot read https://<user>@hub.example\n"


def completions(line: str, word: int = 1, program: tuple[str, ...] = ("llmfusion",)) -> list[str]:
    """What argcomplete prints for a shell's line, by its own protocol: on descriptor 8, between vertical tabs."""
    protocol = {
        "_ARGCOMPLETE": str(word),
        "_ARGCOMPLETE_IFS": "\v",
        "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    read, write = os.pipe()
    call = ["bash", "-c", f"exec {sys.executable} -m llmfusion 8>&{write} 9>/dev/null"]
    done = subprocess.run(call, env={**os.environ, **protocol}, pass_fds=[write], capture_output=True, text=True)
    os.close(write)
    with os.fdopen(read) as file:
        words = file.read()
    assert done.stdout + done.stderr == ""
    return sorted(word.strip() for word in words.split("\v") if word)


@pytest.mark.parametrize(
    "address", ["http://me:s3cr3tpw@[::1", "http://me:s3cr3tpw@host:99999", "me:s3cr3tpw@host", "http://", "ftp://host"]
)
@pytest.mark.parametrize("command", ["doctor", "step"])
def test_an_address_of_the_hub_that_is_none_is_one_line_also_in_a_jobs_log(
    address: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    log = tmp_path / "job.log"
    step = ["stage_dataset", "--spec", "{}", "--out", str(tmp_path / "results/a/manifest.json"), "--log", str(log)]
    assert main([command, *(step if command == "step" else [str(ROOT / "config/mini.yaml")])]) == 1
    expected = "error: HF_ENDPOINT is no address: expected http(s)://host[:port], or unset it for the public hub\n"
    assert capsys.readouterr().err == expected
    assert command == "doctor" or log.read_text() == expected


INTERRUPTED_AT = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "MODULE":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
"""


@pytest.mark.parametrize(
    ("module", "status", "says"),
    [
        ("llmfusion.cli.main", -2, ""),
        ("argparse", -2, ""),
        ("llmfusion.cli.step", 130, "interrupted\n"),
        ("llmfusion.study.plugins", 130, "interrupted\n"),
    ],
)
def test_ctrl_c_while_a_job_still_imports_shows_no_traceback(
    module: str, status: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_AT.replace("MODULE", module))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "llmfusion", "step", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, says)


def test_commands_are_completed() -> None:
    assert completions("llmfusion s") == ["sandbox", "schema", "step"]
    assert set(completions("llmfusion ")) >= set(COMMANDS)


def test_options_of_a_command_are_completed() -> None:
    assert completions("llmfusion estimate --me") == ["--measured-by"]
    assert {"--spec", "--out", "--inputs", "--minutes"} <= set(completions("llmfusion step score --"))


def test_names_of_steps_are_completed() -> None:
    assert completions("llmfusion step stage_") == ["stage_base", "stage_dataset", "stage_tasks"]


def test_a_clone_that_is_not_installed_is_completed_as_a_module_too() -> None:
    assert completions("python -m llmfusion step mer", word=3) == ["merge_models"]
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "src/llmfusion/__main__.py").read_text()[:1024]
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "src/llmfusion/cli/main.py").read_text()[:1024]


def cpu_seconds(*words: str, folder: Path = ROOT) -> float:
    """The least CPU seconds of three runs of a command."""
    out = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PROGRAM, *words], cwd=folder, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        out.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(out)


def test_it_starts_at_once() -> None:
    assert cpu_seconds("--help") < 0.3
    assert cpu_seconds("check", "config/mini.yaml") < 1.0  # 0.3 on a quiet machine
