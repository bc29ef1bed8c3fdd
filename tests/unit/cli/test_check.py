"""``llmfusion check`` as a user types it."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llmfusion import ROOT
from llmfusion.cli.main import main
from tests.unit.mini_study import MINI, write

BAD = MINI.read_text().replace("format: letter", "format: leter", 1).replace("noisy-code: 450", "noisy-cod: 450", 1)
LOADED = """
import sys
from llmfusion.cli.main import main
status = main(["check", *sys.argv[1:]])
print([name for name in ("torch", "numpy", "numba", "pandas") if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_good_study_is_counted_and_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(MINI)]) == 0
    assert capsys.readouterr().out.endswith("no mistakes\n")


def test_a_bad_study_exits_2_with_all_mistakes_in_2_cpu_seconds(tmp_path: Path) -> None:
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "llmfusion", "check", str(write(tmp_path, BAD))],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert cpu_seconds() - before < 2
    assert done.returncode == 2
    assert done.stdout == ""
    assert "2 mistakes; nothing was started" in done.stderr
    assert "tasks.mmlu.format" in done.stderr
    assert "mixes.student.datasets.noisy-cod" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("text", "status"), [(MINI.read_text(), 0), (BAD, 2)])
def test_no_heavy_library_is_imported(tmp_path: Path, text: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, str(write(tmp_path, text))], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_several_studies_are_all_checked_and_the_worst_status_is_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write(tmp_path, BAD)), str(MINI), str(tmp_path / "absent.yaml")]) == 2
    printed = capsys.readouterr()
    assert "no mistakes" in printed.out
    assert "tasks.mmlu.format" in printed.err
    assert "cannot be read" in printed.err


def test_no_file_is_a_mistake_of_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check"])
    assert caught.value.code == 2
