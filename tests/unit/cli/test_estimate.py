"""``llmfusion estimate`` as a user types it."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmfusion import ROOT
from llmfusion.cli.main import main
from tests.unit.finished_jobs import finish, study_file, workload

PAPER = ROOT / "config/config.yaml"


def test_the_estimate_of_the_paper_is_printed_in_two_seconds_without_torch() -> None:
    run = f"main(['estimate', {str(PAPER)!r}, '--gpus', '8'])"
    code = f"import sys; from llmfusion.cli.main import main; {run}; print('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    table = {line.rsplit(maxsplit=6)[0].strip(): line.split()[-6:] for line in done.stdout.splitlines()[2:13] if line}
    assert table["trainings"][:2] == ["21", "0"]
    assert table["total"][0] == "366"
    assert "wall time on 8 GPUs" in done.stdout
    assert "mfu                     0.4" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_model_too_large_for_a_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    large = tmp_path / "large.yaml"
    large.write_text(PAPER.read_text().replace("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B"))
    main(["estimate", str(large)])
    assert "GB in one GPU, 80 are assumed: see `sharding` in docs/cluster.md" in capsys.readouterr().out
    main(["estimate", str(PAPER)])
    assert "in one GPU" not in capsys.readouterr().out


def test_disk_that_will_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = study_file(tmp_path)
    assert main(["estimate", str(file)]) == 0
    assert "are free in" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    assert main(["estimate", str(file)]) == 1
    assert "free some, or set the study's 'directory' to a larger place; nothing was started" in capsys.readouterr().err


def test_what_is_made_needs_no_more_disk_and_no_more_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = study_file(tmp_path)
    finish(workload(file))
    assert main(["estimate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "still to do: 0 hours, one job at a time, without a GPU" in out
    assert "disk: 0 KiB are needed" in out
    assert "measured: " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--assume", "mfuu=0.3"], "there is no assumption 'mfuu'; did you mean 'mfu'?"),
        (["--assume", "mfu=high"], "--assume mfu=high: expected mfu=NUMBER"),
        (["--assume", "mfu=-1"], "expected a number that is not negative"),
        (["--gpus", "0"], "--gpus"),
    ],
)
def test_mistakes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert main(["estimate", str(study_file(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_assumption_that_is_given_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["estimate", str(PAPER), "--assume", "mfu=0.2", "--measured-by", str(study_file(tmp_path))]) in (0, 1)
    out = capsys.readouterr().out
    assert "0.2" in out
    assert "(given)" in out
    assert float(next(line for line in out.splitlines() if line.startswith("trainings")).split()[3]) == pytest.approx(
        563, abs=3
    )
