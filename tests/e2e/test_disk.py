"""A full disk: jobs fail and say what they need and what is free, nothing half-made is seen, and with room again all is as undisturbed.

The study's directory is a small tmpfs, which an ordinary user can have within bubblewrap; it lives as long as the program that
runs in there, which is this module itself.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmfusion.artifacts import store as artifacts
from llmfusion.evaluation.sandbox import bubblewrap
from llmfusion.study.graph import output_of
from llmfusion.study.snakemake import checked
from tests.e2e.conftest import TARGET, Project
from tests.e2e.test_runs import PROFILE, results
from tests.project import environment

KIB, MIB = 2**10, 2**20
DISK = 32 * MIB
LEFT = (0, 8 * KIB, 32 * KIB, 128 * KIB, 400 * KIB, MIB, 4 * MIB)  # what is left to a stage, until it succeeds
STAGES = {  # none needs a later one
    "data": "data/dataset/text-facts",
    "base": "models/base/code",
    "mix": "data/mix/student",
    "capture": "teachers/shards/base/code/student/1-of-2",
    "generate": "data/generated/base/code/student",
    "train": "models/trained/kd-code",
    "merge": "models/merged/ta-homogeneous",
    "answers": "answers/trained/kd-code/all",
    "scores": "scores/trained/kd-code/humaneval",
    "table": "tables/table2",
}


def on_a_small_disk(folder: Path, made: Path, left: Sequence[int], stages: Sequence[str]) -> str:
    """Run :func:`drive` where ``runs/tiny`` of ``folder`` is a small disk; returns what it told."""
    place = folder / "runs/tiny"
    place.mkdir(parents=True)
    inside = [sys.executable, "-m", "tests.e2e.test_disk", str(folder), str(made), ",".join(map(str, left)), *stages]
    words = [bubblewrap(), "--dev-bind", "/", "/", "--size", str(DISK), "--tmpfs", str(place), *inside]
    paths = os.pathsep.join([str(folder), str(folder / "src")])
    done = subprocess.run(
        words,
        cwd=folder,
        env={**environment(), "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_a_capture_and_a_training_without_room_say_what_they_need(made: Path, project: Project) -> None:
    told = on_a_small_disk(project("disk"), made, (0, 128 * KIB, 4 * MIB), ("capture", "train"))
    assert "capture: 0 KiB left: status 1" in told
    assert re.search(
        r"capture: 128 KiB left: status 1 error: the cache of base/code over student needs \d+ KiB, \d+ KiB are free in /",
        told,
    ), told
    assert re.search(
        r"train: 128 KiB left: status 1 error: a model of 118,080 parameters \(float32\) needs 461 KiB, \d+ KiB are free in /",
        told,
    ), told


@pytest.mark.long
def test_every_stage_on_a_disk_that_is_full(made: Path, project: Project) -> None:
    print(on_a_small_disk(project("disk"), made, LEFT, tuple(STAGES)))


class Disk:
    """The small disk with a filler on it."""

    def __init__(self, place: Path):
        self.place, self.filler = place, place / "filler"

    def leave(self, size: int) -> None:
        """Fill the disk up to ``size`` bytes."""
        with open(self.filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.place).free - size)
        assert shutil.disk_usage(self.place).free == size

    def free(self) -> None:
        self.filler.unlink()


def drive(folder: Path, made: Path, lefts: Sequence[int], stages: Sequence[str]) -> None:
    """Give each stage too little room, then more and more, and compare what is made with the undisturbed study."""
    place = folder / "runs/tiny"
    _, plan = checked(folder / "config/tiny.yaml")
    disk, expected, whole = Disk(place), results(made), len(stages) == len(STAGES)
    if not whole:
        shutil.copytree(made / "runs/tiny", place, symlinks=True, dirs_exist_ok=True)
        for stage in stages:
            shutil.rmtree(place / "results" / STAGES[stage])
    for stage in stages:
        output = output_of(STAGES[stage])
        inputs = plan.artifacts[STAGES[stage]]["inputs"]
        if whole and inputs:
            code, told = run(folder, *inputs)
            assert code == 0, told
        for left in lefts:
            disk.leave(left)
            code, told = run(folder, output)
            disk.free()
            why = next(
                (line.strip() for line in told.splitlines() if "are free" in line or "No space left" in line), ""
            )
            print(f"{stage}: {left / KIB:.0f} KiB left: status {code} {why}", flush=True)
            sound(folder, expected)
            if code == 0:
                break
            assert why or left < 32 * KIB, told  # with no room at all, no log can be written that says it
            assert not artifacts.manifest_of(place / output).exists()
        assert left, "made from nothing"
        assert code == 0, told
        assert artifacts.manifest_of(place / output).exists()
    if whole:
        code, told = run(folder, TARGET)
        assert code == 0, told
        assert results(folder) == expected


def run(folder: Path, *targets: str, options: Sequence[str] = ("--no-hooks",)) -> tuple[int, str]:
    """Status and output of Snakemake in ``folder``, without the check that refuses before the first job."""
    words = ["snakemake", *PROFILE, "--cores", "2", *options, *targets]
    done = subprocess.run(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def sound(folder: Path, expected: dict[str, bytes]) -> None:
    """Every manifest that is there verifies and is the undisturbed run's; there are no drafts."""
    base = folder / "runs/tiny/results"
    for name in (name for name in expected if name.endswith("manifest.json")):
        if (base / name).exists():
            artifacts.read(base / name, memory=None)
            assert (base / name).read_bytes() == expected[name], name
    assert [p.name for p in base.rglob(".*")] == []


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")], sys.argv[4:])
