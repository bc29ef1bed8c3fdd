"""Jobs that fail, wait, are forced or are killed: what is printed, what stands in logs, and what is left."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts import store
from llmfusion.io.digests import canonical, digest
from llmfusion.study.addresses import output_of
from llmfusion.study.snakemake import checked
from tests.project import clone, environment, jobs, llmfusion, snakemake, study, text_of, wait_until

ADDRESS = "data/dataset/text-facts"
TARGET = output_of(ADDRESS)
MINI = "--configfile=config/mini.yaml"
COMMANDS = {
    "plain": ("--cores", "1", MINI),
    "mini": ("--profile", "profiles/mini"),
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("jobs"))


@pytest.fixture
def step(fresh: Path) -> Iterator[Callable[[str], None]]:
    """Puts Python lines at the beginning of the step's ``build``, for one test."""
    file = fresh / "src/llmfusion/steps/stage_dataset.py"
    before = file.read_text()

    def begin_with(lines: str) -> None:
        head, definition, body = before.partition("def build(job: Job) -> None:\n")
        inner = "".join(f"    {line}\n" for line in lines.splitlines())
        file.write_text(head + definition + inner + body)

    yield begin_with
    file.write_text(before)


def log(folder: Path) -> Path:
    return folder / f"runs/mini/logs/{ADDRESS}.log"


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    place = (folder / "runs/mini" / TARGET).parent
    return {p.name: (p.read_bytes(), p.stat().st_ino) for p in place.iterdir() if p.name != "manifest.json"} | {
        "manifest.json": ((place / "manifest.json").read_bytes(), 0)
    }


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_prints_the_log_of_a_job_that_failed(fresh: Path, step: Callable, words: tuple[str, ...]) -> None:
    step('raise RuntimeError("on purpose")')
    output = snakemake(fresh, TARGET, "-f", *words, fails=True)
    printed = output.split(f"Logfile logs/{ADDRESS}.log:\n")[1]
    assert "RuntimeError: on purpose" in printed
    assert printed.splitlines()[1].startswith("# python -m llmfusion step stage_dataset --spec - --out ")


def test_what_fails_before_the_log_is_opened_is_printed_too(fresh: Path, step: Callable) -> None:
    file = fresh / "src/llmfusion/steps/stage_dataset.py"
    file.write_text("import nothing_of_this_name\n" + file.read_text())
    output = snakemake(fresh, TARGET, "-f", *COMMANDS["plain"], fails=True)
    printed = output.split(f"Logfile logs/{ADDRESS}.log:\n")[1]
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in printed


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_forced_job_that_fails_loses_nothing(fresh: Path, step: Callable, words: tuple[str, ...]) -> None:
    snakemake(fresh, TARGET, *words)
    before = files(fresh)
    step('raise RuntimeError("on purpose")')
    output = snakemake(fresh, TARGET, "-f", *words, fails=True)
    assert f"put back, because the job that was to make it again did not: {TARGET}" in output
    assert files(fresh) == before
    assert "Nothing to be done" in snakemake(fresh, TARGET, *words)
    assert not (fresh / "runs/mini/work/kept").exists()


def test_a_changed_setting_whose_job_fails_is_planned_again_and_taken_back_is_not(fresh: Path, step: Callable) -> None:
    snakemake(fresh, TARGET, *COMMANDS["plain"])
    before = files(fresh)

    def fewer(content: dict[str, Any]) -> None:
        content["datasets"]["text-facts"]["seed"] = 5

    changed = ("--cores", "1", f"--configfile={study(fresh / 'config/changed.yaml', fewer)}")
    step('raise RuntimeError("on purpose")')
    snakemake(fresh, TARGET, *changed, fails=True)
    assert jobs(snakemake(fresh, "-n", TARGET, *changed)) == {"stage_dataset": 1}
    assert "Nothing to be done" in snakemake(fresh, TARGET, *COMMANDS["plain"])
    assert files(fresh) == before


def test_a_forced_job_that_works_makes_it_anew_and_keeps_no_copy(fresh: Path) -> None:
    snakemake(fresh, TARGET, *COMMANDS["plain"])
    before = files(fresh)
    assert jobs(snakemake(fresh, TARGET, "-f", *COMMANDS["plain"])) == {"stage_dataset": 1}
    after = files(fresh)
    assert after["manifest.json"] == before["manifest.json"]
    assert after["provenance.json"] != before["provenance.json"]
    assert not (fresh / "runs/mini/work/kept").exists()


def start(folder: Path, *words: str) -> subprocess.Popen:
    with open(folder / "run.log", "w") as out:
        return subprocess.Popen(
            ["snakemake", TARGET, *COMMANDS["plain"], *words],
            cwd=folder,
            env=environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def test_what_a_killed_snakemake_was_about_to_make_again_is_put_back_by_the_next(fresh: Path, step: Callable) -> None:
    snakemake(fresh, TARGET, *COMMANDS["plain"])
    before = files(fresh)
    step('import time; print("at work", flush=True); time.sleep(600)')
    main = start(fresh, "-f")
    wait_until(lambda: "at work" in text_of(log(fresh)), main)
    assert not (fresh / "runs/mini" / TARGET).exists()
    os.killpg(main.pid, signal.SIGKILL)
    main.wait()
    snakemake(fresh, TARGET, *COMMANDS["plain"], "--unlock")
    assert "Nothing to be done" in snakemake(fresh, TARGET, *COMMANDS["plain"])
    assert files(fresh) == before


def test_a_job_that_waits_leaves_the_log_and_the_measurements_of_the_one_that_works(
    fresh: Path, step: Callable, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    step(
        f'import time; from pathlib import Path\nprint("first", flush=True)\n'
        f'while not Path("{go}").exists(): time.sleep(0.1)\nprint("last", flush=True)'
    )
    works = start(fresh, "-f")
    wait_until(lambda: "first" in text_of(log(fresh)), works)
    (fresh / "run.log").rename(fresh / "works.log")
    waits = start(fresh, "-f", "--nolock")
    wait_until(lambda: f"waiting for work/{ADDRESS}/lease: held by process" in text_of(fresh / "run.log"), waits)
    wait_until(lambda: "first" in text_of(log(fresh)), waits, 5)
    go.touch()
    assert (works.wait(60), waits.wait(60)) == (0, 0), (fresh / "works.log").read_text() + text_of(fresh / "run.log")
    said = [line for line in text_of(log(fresh)).splitlines() if line in ("first", "last") or "adopted" in line]
    assert said == ["first", "last", f"{TARGET} was finished meanwhile; adopted"]
    assert list(log(fresh).parent.glob(".*")) == []
    record = json.loads((fresh / "runs/mini" / TARGET).with_name("provenance.json").read_bytes())
    assert 0 < record["cpu_seconds"] < 60
    assert record["seconds"] < 60
    assert 10 < record["memory_mb"] < 2000
    assert not (fresh / "runs/mini/logs/benchmarks").exists()


BARS = """
import sys, time
from tqdm import tqdm, trange
from tqdm.auto import tqdm as auto
from datasets import Dataset
from huggingface_hub.utils import tqdm as hub
from transformers.utils.logging import tqdm as of_transformers
for bar in (tqdm, auto, hub, of_transformers, lambda items: tqdm(items, file=sys.stdout)):
    for _ in bar(range(30)): time.sleep(0.001)
Dataset.from_list([{"a": 1}] * 2000).map(lambda row: row, num_proc=None)
"""


def test_no_library_draws_its_progress_into_a_log(fresh: Path, step: Callable) -> None:
    step(BARS)
    snakemake(fresh, TARGET, "-f", *COMMANDS["plain"])
    assert b"\r" not in log(fresh).read_bytes()
    assert "it/s" not in text_of(log(fresh))


@pytest.mark.long
def test_specs_longer_than_an_argument_can_be_are_planned_and_run(fresh: Path) -> None:
    """Twenty replicates of the miniature study; its table out of cells that are written here."""
    twenty = fresh / "config/twenty.yaml"
    done = llmfusion(fresh, "replicate", "config/mini.yaml", str(twenty), "--seeds", *map(str, range(1, 21)))
    assert done.returncode == 0, done.stderr
    text = twenty.read_text()
    twenty.write_text(re.sub(r"^directory: .*$", f"directory: {fresh / 'runs/twenty'}", text, count=1, flags=re.M))
    artifacts = checked(twenty)[1].artifacts
    table = artifacts["tables/seeds"]
    assert len(table.spec) > 131_072
    for path in table.inputs:
        address = path.removeprefix("results/").removesuffix(".json")
        planned = artifacts[address]
        facts = {"k": 1, "n": 2, "score": 50.0, "stderr": 35.355339}
        body = {"address": address, "spec": planned.spec, "fingerprint": planned.fingerprint, "inputs": {}, "files": {}}
        body["facts"] = facts
        file = fresh / "runs/twenty" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(store.text_of({**body, "sha256": digest(canonical(body))}))
    words = ("results/seeds.csv", "--cores", "1", f"--configfile={twenty}")
    assert jobs(snakemake(fresh, *words)) == {"table": 1}
    rows = (fresh / "runs/twenty/results/seeds.csv").read_text().splitlines()
    assert len(rows) == 1 + len(json.loads(table.spec)["rows"])
    again = text_of(fresh / "runs/twenty/logs/tables/seeds.log").splitlines()[0].removeprefix("# ")
    (fresh / "runs/twenty/results/seeds.csv").unlink()
    (fresh / "runs/twenty/again.sh").write_text(again)
    place = fresh / "runs/twenty"
    subprocess.run(["bash", "again.sh"], cwd=place, env=environment() | {"PYTHONPATH": str(fresh / "src")}, check=True)
    assert (fresh / "runs/twenty/results/seeds.csv").read_text().splitlines() == rows
