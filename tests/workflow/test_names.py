"""Names of files and folders that a shell, SLURM or Snakemake would read: quoted, or refused before anything starts."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.project import clone, snakemake, study

DATASET = "results/data/dataset/text-facts/manifest.json"
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
OWN = {"kind": "path", "layout": "messages", "domain": "general", "license": "own"}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("names"))


def nothing_was_run(folder: Path) -> bool:
    return not list(folder.rglob("pwned*"))


@pytest.mark.parametrize(
    "name",
    [
        "$(touch pwned)",
        "`touch pwned`",
        "a;touch pwned",
        "a&b",
        "a|b",
        "it's",
        'a"b',
        "a\\b",
        "a*",
        "{x}",
        "%j",
        "a\nb",
    ],
)
def test_a_study_in_a_file_or_folder_that_a_shell_would_read_is_refused(fresh: Path, name: str) -> None:
    file = study(fresh / f"config/{name}.yaml", lambda content: None)
    try:
        output = snakemake(fresh, "--cores", "1", DATASET, f"--configfile={file}", fails=True)
    finally:
        file.unlink()
    assert "the study's file: " in output
    assert "takes for something else; allowed: letters and digits" in output
    in_it = study(fresh / "config/in-it.yaml", lambda content: content.update(directory=f"runs/{name}"))
    assert "directory: got " in snakemake(fresh, "--cores", "1", DATASET, f"--configfile={in_it}", fails=True)
    assert nothing_was_run(fresh)


def test_spaces_and_letters_of_any_script_work(fresh: Path) -> None:
    def elsewhere(content: dict[str, Any]) -> None:
        content["directory"] = "runs/été 2, 本"

    file = study(fresh / "config/für mich.yaml", elsewhere)
    snakemake(fresh, "--cores", "1", DATASET, f"--configfile={file}")
    assert (fresh / "runs/été 2, 本" / DATASET).is_file()


def test_a_clone_in_a_folder_that_a_shell_would_read_is_refused(fresh: Path, tmp_path: Path) -> None:
    place = shutil.copytree(fresh, tmp_path / "$(touch pwned)", symlinks=True)
    output = snakemake(place, "-n", DATASET, fails=True)
    assert re.search(r"the (study's file|folder of the clone): .* has '\$' '\(' '\)'", output), output
    assert "Traceback" not in output
    assert nothing_was_run(tmp_path)


def test_files_of_the_users_own_may_have_any_name_but_braces(fresh: Path) -> None:
    own = "config/$(touch pwned) `x` %j;&'\".jsonl"
    (fresh / own).write_text(ROW * 3000)

    def with_own(path: str) -> Path:
        return study(
            fresh / "config/own.yaml", lambda content: content["datasets"].update({"text-facts": OWN | {"path": path}})
        )

    snakemake(fresh, "--cores", "1", DATASET, f"--configfile={with_own(own)}")
    assert nothing_was_run(fresh)
    output = snakemake(fresh, "-n", DATASET, f"--configfile={with_own('config/{x}.jsonl')}", fails=True)
    assert "datasets.text-facts.path: got 'config/{x}.jsonl': braces are wildcards to Snakemake" in output
    assert "Traceback" not in output
