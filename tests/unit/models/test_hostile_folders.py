"""Every hostile, odd and honest folder of :mod:`tests.hostile.folders`, in one process of bounded memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.folders import GOOD_GGUF, gguf_cases, honest_cases, hostile_cases, special_gguf_cases

ROOT = Path(__file__).parents[3]
LONGEST_MESSAGE = 1500
GGUF_NAMES = [f"gguf: {name}" for name in (*(name for name, _ in (*gguf_cases(), *special_gguf_cases())), GOOD_GGUF)]
NAMES = [name for name, *_ in [*hostile_cases(), *honest_cases()]] + GGUF_NAMES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, pivot: Any) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("hostile")
    base = shutil.copytree(pivot.folder, place / "base")
    command = [sys.executable, "-m", "tests.hostile.folders", str(base), str(place / "case")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert done.returncode == 0, f"after {len(lines)} cases: {done.stderr[-3000:]}"
    return {result["name"]: result for result in lines}


def test_there_are_at_least_110_hostile_folders_and_11_kinds_of_damaged_gguf_files() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert len(list(hostile_cases())) >= 110
    assert len(list(gguf_cases())) >= 11


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_refused_in_a_sentence_or_read_and_nothing_outside_it_is(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    result = results[name]
    ways = result["ways"]
    for way, ended in ways.items():
        assert ended["end"] != "broken", f"{way}: {ended['message']}"
        assert not ended.get("leaks"), way
        assert "Traceback" not in ended["message"]
        assert "secret-0ddba11" not in ended["message"]
        assert len(ended["message"]) < LONGEST_MESSAGE
    if result["word"] is None:
        assert {way: ended["message"] for way, ended in ways.items() if ended["end"] != "ok"} == {}
        return
    assert ways["stage"]["end"] == "refused"
    assert len(ways["stage"]["message"].splitlines()) == 1
    assert result["word"] in ways["stage"]["message"]
    assert "model" in ways["stage"]["message"]
