"""A full disk: jobs say what they need and what is free, nothing half-made is seen, and with room again all is made.

The study's directory is a small tmpfs, which an ordinary user can have within bubblewrap; it lives as long as the
program that runs in there, which is this module itself.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmfusion.artifacts import store
from llmfusion.evaluation.sandbox import bubblewrap
from llmfusion.study.addresses import manifest_of, output_of
from llmfusion.study.snakemake import checked
from tests.e2e.conftest import PROFILE, TARGET, Project
from tests.project import environment, results

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
    """Run :func:`drive` where ``runs/tiny`` of ``folder`` is a small disk; returns what it printed."""
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
    output = on_a_small_disk(project("disk"), made, (0, 128 * KIB, 4 * MIB), ("capture", "train"))
    assert "capture: 0 KiB left: status 1" in output
    for stage, need in {
        "capture": r"the cache of base/code over student needs \d+ KiB",
        "train": r"a model of 118,080 parameters \(float32\) needs 461 KiB",
    }.items():
        message = rf"{stage}: 128 KiB left: status 1 error: {need}, \d+ KiB are free in /"
        assert re.search(message, output), output


@pytest.mark.long
def test_every_stage_on_a_disk_that_is_full(made: Path, project: Project) -> None:
    print(on_a_small_disk(project("disk"), made, LEFT, tuple(STAGES)))


class Disk:
    """The small disk with a filler on it."""

    def __init__(self, place: Path):
        self.place = place
        self.filler = place / "filler"

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
    disk = Disk(place)
    expected = results(made)
    whole = len(stages) == len(STAGES)
    if not whole:
        shutil.copytree(made / "runs/tiny", place, symlinks=True, dirs_exist_ok=True)
        for stage in stages:
            shutil.rmtree(place / "results" / STAGES[stage])
    for stage in stages:
        inputs = plan.artifacts[STAGES[stage]].inputs
        if whole and inputs:
            run(folder, *inputs)
        give_room_until_made(stage, disk, lefts, folder, expected)
    if whole:
        run(folder, TARGET)
        assert results(folder) == expected


def give_room_until_made(
    stage: str, disk: Disk, lefts: Sequence[int], folder: Path, expected: dict[str, bytes]
) -> None:
    """Run a stage with each amount of room until its output is made; before, it must say why not and leave none."""
    output = output_of(STAGES[stage])
    manifest = manifest_of(disk.place / output)
    for left in lefts:
        disk.leave(left)
        status, text = run(folder, output, may_fail=True)
        disk.free()
        why = next((line.strip() for line in text.splitlines() if "are free" in line or "No space left" in line), "")
        print(f"{stage}: {left / KIB:.0f} KiB left: status {status} {why}", flush=True)
        sound(folder, expected)
        if status == 0:
            break
        assert why or left < 32 * KIB, text  # with no room at all, no log can be written that says it
        assert not manifest.exists()
    assert left, "made from nothing"
    assert status == 0, text
    assert manifest.exists()


def run(folder: Path, *targets: str, may_fail: bool = False) -> tuple[int, str]:
    """Status and output of Snakemake in ``folder``, without the check that refuses before the first job.

    Asserts that it succeeds, unless it ``may_fail``.
    """
    words = ["snakemake", *PROFILE, "--cores", "2", "--no-hooks", *targets]
    done = subprocess.run(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert may_fail or done.returncode == 0, done.stdout
    return done.returncode, done.stdout


def sound(folder: Path, expected: dict[str, bytes]) -> None:
    """Every manifest that is there verifies and is the undisturbed run's; there are no drafts."""
    base = folder / "runs/tiny/results"
    for name in (name for name in expected if name.endswith("manifest.json")):
        if (base / name).exists():
            store.read(base / name, memory=None)
            assert (base / name).read_bytes() == expected[name], name
    assert [p.name for p in base.rglob(".*")] == []


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")], sys.argv[4:])
