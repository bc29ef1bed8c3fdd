"""300 random mistakes in valid studies: a clean dry run or an error message, never a traceback or a started job."""

import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmfusion.study import strict_yaml
from llmfusion.study.errors import StudyError
from llmfusion.study.load import read_study
from tests.mutations import as_yaml, mutate, mutate_text
from tests.odd_studies import REFUSED
from tests.project import ROOT, clone, environment
from tests.unit.mini_study import small

DEFAULT = 15


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("mutations"))


def outcome(fresh: Path, seed: int) -> str:
    """Plan the ``seed``-th mutated study as its user would; returns ``accepted`` or ``refused``."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        content = mutate_text(draw.choice([p.read_text() for p in sorted((ROOT / "config").glob("*.yaml"))]), draw)
    else:
        data = small() if seed % 3 == 1 else strict_yaml.load(ROOT / "config/config.yaml")[0]
        for _ in range(draw.randint(1, 3)):
            mutate(data, draw)
        content = as_yaml(data).encode()
    file = fresh / f"config/mutated-{seed}.yaml"
    file.write_bytes(content)
    words = ["snakemake", "-n", "tables", "--cores", "1", "--configfile", str(file)]
    done = subprocess.run(words, cwd=fresh, env=environment(), capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, f"seed {seed}\n{output[:3000]}"
    if done.returncode == 0:
        assert "This was a dry-run" in output or "Nothing to be done" in output, f"seed {seed}\n{output[-3000:]}"
        return "accepted"
    if "Config file is not valid JSON or YAML" in output:  # Snakemake's message, it reads the file first
        with pytest.raises(StudyError, match=rf"{file.name}:\d+: "):
            read_study(file)
        return "refused"
    assert file.name in output, f"seed {seed}\n{output[-3000:]}"
    assert "nothing was started" in output, f"seed {seed}\n{output[-3000:]}"
    return "refused"


def outcomes(fresh: Path, seeds: range) -> Counter[str]:
    with ThreadPoolExecutor(2) as pool:
        return Counter(pool.map(lambda seed: outcome(fresh, seed), seeds))


def test_mutated_studies_are_planned_or_refused(fresh: Path) -> None:
    assert outcomes(fresh, range(DEFAULT))["refused"] > DEFAULT / 3


@pytest.mark.parametrize("name", ["a key that is null", "a long cycle of models", "a home directory"])
def test_an_odd_study_is_refused_by_a_dry_run_too(fresh: Path, name: str) -> None:
    content, told = REFUSED[name]
    file = fresh / "config/odd.yaml"
    file.write_text(str(content))
    words = ["snakemake", "-n", "tables", "--cores", "1", "--configfile", str(file)]
    done = subprocess.run(words, cwd=fresh, env=environment(), capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert told.removeprefix(":29") in output
    assert "nothing was started" in output
    assert "Traceback" not in output


@pytest.mark.long
def test_300_mutated_studies_are_planned_or_refused(fresh: Path) -> None:
    counts = outcomes(fresh, range(DEFAULT, 300))
    print(dict(counts))
    assert counts["refused"] > 100
    assert counts["accepted"] > 10
