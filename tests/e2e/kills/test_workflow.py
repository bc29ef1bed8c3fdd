"""The whole workflow killed: in the end there is what an undisturbed run makes, and each artifact had one writer."""

import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.e2e.conftest import PROFILE, TARGET, Project
from tests.e2e.kills.ordeal import Ordeal, same_as_undisturbed, without
from tests.project import environment, snakemake, text_of, wait_until

LEAF = (  # nothing else needs them
    "models/trained/seqkd-code",
    "answers/trained/seqkd-code",
    "scores/trained/seqkd-code",
    "table2.csv",
    "table2.md",
    "table2.json",
)


def test_snakemake_killed_and_a_job_killed_give_the_undisturbed_result(made: Path, project: Project) -> None:
    ordeal = Ordeal(without(made, project("two-kills"), *LEAF), made, seed=1)
    ordeal.run(["main", "job"])
    assert ordeal.hits == {"main": 1, "job": 1}, ordeal.report("")
    same_as_undisturbed(ordeal.folder, made)


@pytest.mark.long
def test_many_kills_at_random_moments_give_the_undisturbed_result(made: Path, project: Project) -> None:
    count, seed = int(os.environ.get("LLMFUSION_KILLS", "20")), int(os.environ.get("LLMFUSION_SEED", "0"))
    left = ["main", "job"] * (count // 2) + ["job"] * (count % 2)
    Random(seed).shuffle(left)
    hits = 0
    while left:
        ordeal = Ordeal(project("kills"), made, seed + len(left))
        ordeal.run(left)
        print("\n".join(ordeal.protocol))
        hits += sum(ordeal.hits.values())
        same_as_undisturbed(ordeal.folder, made)
    assert hits == count


@pytest.mark.long
def test_a_second_snakemake_names_the_lock_of_the_first(made: Path, project: Project) -> None:
    folder = without(made, project("locked"), *LEAF)
    words = ["snakemake", *PROFILE, "--cores", "2", TARGET]
    first = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((folder / "runs/tiny/work/models/trained/seqkd-code/lease").exists, first)
    second = snakemake(folder, *words[1:], fails=True)
    assert "Directory cannot be locked" in second
    assert "Traceback" not in second
    assert first.wait() == 0
    same_as_undisturbed(folder, made)


@pytest.mark.long
def test_two_snakemakes_without_a_lock_have_one_writer_an_artifact(made: Path, project: Project) -> None:
    folder = project("two")
    words = ["snakemake", *PROFILE, "--cores", "1", "--nolock", TARGET]
    logs = [folder / f"run{i}.log" for i in range(2)]
    both = [
        subprocess.Popen(words, cwd=folder, env=environment(), stdout=log.open("w"), stderr=subprocess.STDOUT)
        for log in logs
    ]
    most: Counter[str] = Counter()
    while any(process.poll() is None for process in both):
        drafts = (folder / "runs/tiny/results").rglob(".*.draft")
        most |= Counter(str(draft).rsplit(".", 2)[0] for draft in drafts)
        time.sleep(0.05)
    adopted = sum("adopted" in text_of(log) for log in (folder / "runs/tiny/logs").rglob("*.log"))
    statuses = [process.returncode for process in both]
    print(f"ended with {statuses}; {len(most)} artifacts made, {adopted} of them adopted by the other")
    assert set(most.values()) == {1}
    assert adopted
    if any(statuses):  # one removed what the other was about to read: an error message, no wrong result
        snakemake(folder, *words[1:])
    same_as_undisturbed(folder, made)
