import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.errors import UserError
from llmfusion.merge import build, parse_options
from llmfusion.models.loading import load_model
from tests.unit.stand_ins import artifact, job

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them is an error
sys.argv = ["merge", *sys.argv[1:]]
runpy.run_module("llmfusion.merge", run_name="__main__")
"""


def command(*arguments, code=("-c", WITHOUT_TORCH)):
    return subprocess.run([sys.executable, *code, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def folders(tmp_path, pivot):
    """Two models whose weights are the pivot's plus 1 and plus 2."""
    out = []
    for j in (1, 2):
        folder = tmp_path / f"m{j}"
        folder.mkdir()
        save_file({name: t + j for name, t in load_file(pivot.folder / "model.safetensors").items()}, folder / "model.safetensors")
        out.append(folder)
    return out


def test_the_command_line_merges_checkpoints_without_torch(tmp_path, pivot, folders):
    out = tmp_path / "out"
    done = command("--method", "ta", "--pivot", pivot.folder, "--models", *folders, "--out", out, "--set", "weight=0.5,0.25", "--set", "lambda=0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "100.0% of them changed" in done.stdout
    state, before = load_model(artifact(out), "float32").state_dict(), load_model(pivot, "float32").state_dict()
    assert all(torch.allclose(state[name], t + 0.5, atol=1e-6) for name, t in before.items())
    card = (out / "README.md").read_text()
    assert "Method `ta`" in card
    assert "- weight: [0.5, 0.25]" in card
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2", "out"}


WRONG = [
    (["--method", "soup"], "soup"),
    (["--set", "tau=0.1"], "tau"),
    (["--set", "lambda=big"], "lambda"),
    (["--set", "weight=0.5,0.2,0.3"], "3 values for 2 models"),
    (["--set", "weight"], "expected KEY=VALUE"),
    (["--set", "weight=[1"], "weight=[1: expected a number"),
    (["--set", "weight=!!bool x"], "expected a number"),
    (["--set", "method=ties"], "method"),
    (["--set", "parents=a"], "parents"),
    (["--set", "pivot=base/x"], "pivot"),
    (["--pivot", "gone"], "gone: is no folder"),
    (["--models", "gone", "gone"], "gone: is no folder"),
    (["--out", "."], "exists already"),
]


@pytest.mark.parametrize(("changed", "told"), WRONG, ids=[" ".join(c) for c, _ in WRONG])
def test_wrong_options_end_with_status_2_and_a_message(tmp_path, pivot, folders, monkeypatch, capsys, changed, told):
    from llmfusion.merge import by_hand

    monkeypatch.chdir(tmp_path)
    given = {"--method": ["ta"], "--pivot": [str(pivot.folder)], "--models": list(map(str, folders)), "--out": ["out"]}
    given[changed[0]] = changed[1:]
    assert by_hand([word for key, values in given.items() for word in (key, *values)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert told in message
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def test_wrong_options_end_the_process_without_a_traceback_and_without_torch(tmp_path, pivot, folders):
    missing, unknown = command("--method", "ta"), command("--method", "soup", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "out")
    for done in (missing, unknown):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert "--pivot" in missing.stderr
    assert "soup" in unknown.stderr


def test_checkpoints_that_do_not_fit_leave_nothing_behind(tmp_path, pivot, folders, capsys):
    from llmfusion.merge import by_hand

    save_file({"w": torch.zeros(1)}, folders[1] / "model.safetensors")
    assert by_hand(["--method", "ta", "--pivot", str(pivot.folder), "--models", *map(str, folders), "--out", str(tmp_path / "out")]) == 2
    assert f"model.norm.weight is missing in {folders[1]}" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def test_options_are_read_as_in_a_study():
    assert parse_options("ta", [], 2) == {"method": "ta"}
    assert parse_options("ta", ["weight=1e-3", "normalize=true"], 2) == {"method": "ta", "weight": 0.001, "normalize": True}
    assert parse_options("ta", ["weight=0.25,0.75"], 2) == {"method": "ta", "weight": [0.25, 0.75]}
    with pytest.raises(UserError, match=r"(?s)tau.*lambda|lambda.*tau"):  # all mistakes at once
        parse_options("ta", ["tau=1", "lambda=x"], 2)


def test_the_step_merges_the_parents_of_its_spec(tmp_path, pivot, folders):
    spec = {"merge": {"method": "ta", "pivot": "base/p", "parents": ["trained/a", "trained/b"]}}
    made = job(tmp_path, spec, {"models/base/p": pivot, "models/trained/a": artifact(folders[0]), "models/trained/b": artifact(folders[1])})
    build(made)
    state, before = load_model(artifact(made.folder), "float32").state_dict(), load_model(pivot, "float32").state_dict()
    assert all(torch.allclose(state[name], t + 1.5, atol=1e-6) for name, t in before.items())
    assert made.facts["parameters"] == pivot.facts["parameters"]
    assert made.facts["vocabulary_sha256"] == pivot.facts["vocabulary_sha256"]
