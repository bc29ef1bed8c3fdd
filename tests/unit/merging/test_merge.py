import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.io.safetensors import layout_of, read_checkpoint_headers
from llmfusion.merging.options import parse_options
from llmfusion.models.loading import load_model
from llmfusion.steps.merge_models import build
from llmfusion.study.schema.base import dump
from tests.unit.stand_ins import artifact, job

FORBIDDEN = ("torch", "transformers", "llmfusion.study.kinds", "llmfusion.study.schema.merging")
WITHOUT_TORCH = f"""
import sys
sys.modules.update(dict.fromkeys({FORBIDDEN}))  # importing them is an error
from llmfusion.cli import main
sys.argv = ["llmfusion", "merge", *sys.argv[1:]]
main.entry()
"""
WITHOUT_KERNELS = f"""
import os, sys
os._exit = sys.exit  # what the process took is printed after it
sys.modules.update(dict.fromkeys({(*FORBIDDEN, "numba")}))
from llmfusion.cli import main
sys.argv = ["llmfusion", "merge", *sys.argv[1:]]
try:
    main.entry()
except SystemExit as end:
    status = end.code
"""
DIES = """
import os, signal
from llmfusion.merging import engine
add, left = engine.Journal.add, [AFTER]
def dies(self, *arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    add(self, *arguments)
engine.Journal.add = dies
"""


def merge(*words):
    """Exit status of ``llmfusion merge`` in this process."""
    return main(["merge", *map(str, words)])


def command(*arguments, code=("-c", WITHOUT_TORCH)):
    return subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def folders(tmp_path, pivot):
    """Two models whose weights are the pivot's plus 1 and plus 2."""
    out = []
    for j in (1, 2):
        folder = tmp_path / f"m{j}"
        folder.mkdir()
        save_file(
            {name: t + j for name, t in load_file(pivot.folder / "model.safetensors").items()},
            folder / "model.safetensors",
        )
        out.append(folder)
    return out


def test_the_command_line_merges_checkpoints_without_torch(tmp_path, pivot, folders):
    out = tmp_path / "out"
    done = command(
        "--method",
        "ta",
        "--pivot",
        pivot.folder,
        "--models",
        *folders,
        "--out",
        out,
        "--set",
        "weight=0.5,0.25",
        "--set",
        "lambda=0.5",
    )
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
    (["--set", "out_dtype=int8"], "out_dtype"),
    (["--threads", "0"], "expected 1 or more"),
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
    (["--out", "a\x1b[2J"], "its name is no text that can be printed"),
    (["--models", "\udcff", "m2"], "its name is no text that can be printed"),
]


def test_a_folder_through_a_link_to_itself_is_refused_in_a_sentence(tmp_path, pivot, folders, capsys):
    (tmp_path / "loop").symlink_to("loop")
    words = ["--method", "ta", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "loop" / "out"]
    assert merge(*words) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'loop'}")


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[" ".join(c) for c, _ in WRONG])
def test_wrong_options_end_with_status_2_and_a_message(tmp_path, pivot, folders, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    words = {"--method": ["ta"], "--pivot": [pivot.folder], "--models": folders, "--out": ["out"]}
    words[changed[0]] = changed[1:]
    assert merge(*(word for key, values in words.items() for word in (key, *values))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def test_wrong_options_end_the_process_without_a_traceback_and_without_torch(tmp_path, pivot, folders):
    missing, unknown = (
        command("--method", "ta"),
        command("--method", "soup", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "out"),
    )
    for done in (missing, unknown):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert "--pivot" in missing.stderr
    assert "soup" in unknown.stderr


def test_checkpoints_that_do_not_fit_leave_nothing_behind(tmp_path, pivot, folders, capsys):
    save_file({"w": torch.zeros(1)}, folders[1] / "model.safetensors")
    assert merge("--method", "ta", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "out") == 2
    assert f"model.norm.weight is missing in {folders[1]}" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def test_another_dtype_is_written_if_it_is_asked_for(tmp_path, pivot, folders, capsys):
    words = ["--method", "ta", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "out"]
    assert merge(*words, "--set", "out_dtype=bfloat16") == 0
    before, after = load_file(pivot.folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert all(torch.allclose(after[name].float(), t + 1.5, rtol=2**-8) for name, t in before.items())
    assert "note: config.json is the pivot's; load with dtype='bfloat16'" in capsys.readouterr().err


def test_options_are_read_as_in_a_study():
    def read(*arguments):
        return dump(parse_options(*arguments), "pivot", "parents")

    assert read("ta", [], 2) == {"method": "ta"}
    expected = {"method": "ta", "weight": 0.001, "normalize": True}
    assert read("ta", ["weight=1e-3", "normalize=true"], 2) == expected
    assert read("ta", ["weight=0.25,0.75"], 2) == {"method": "ta", "weight": [0.25, 0.75]}
    with pytest.raises(UserError, match=r"(?s)tau.*lambda|lambda.*tau"):  # all mistakes at once
        read("ta", ["tau=1", "lambda=x"], 2)


def test_the_step_merges_the_parents_of_its_spec(tmp_path, pivot, folders):
    spec = {"merge": {"method": "ta", "pivot": "base/p", "parents": ["trained/a", "trained/b"]}}
    made = job(
        tmp_path,
        spec,
        {"models/base/p": pivot, "models/trained/a": artifact(folders[0]), "models/trained/b": artifact(folders[1])},
    )
    build(made)
    state, before = load_model(artifact(made.folder), "float32").state_dict(), load_model(pivot, "float32").state_dict()
    assert all(torch.allclose(state[name], t + 1.5, atol=1e-6) for name, t in before.items())
    assert made.facts["parameters"] == pivot.facts["parameters"]
    assert made.facts["vocabulary_sha256"] == pivot.facts["vocabulary_sha256"]


def test_the_folder_says_what_it_was_made_from_and_holds(tmp_path, pivot, folders):
    out = tmp_path / "out"
    done = command(
        "--method", "rsaf_literal", "--pivot", pivot.folder, "--models", *folders, "--out", out, "--threads", "2"
    )
    assert done.returncode == 0
    assert re.search(
        r"warning: the merge is nearly the pivot: rsaf_literal kept [0-9.]+% of the sum of squares", done.stderr
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    entries = read_checkpoint_headers(out)
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry["size"] == len(content)
        if "sha256" in entry:
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        else:
            assert {t: xxhash.xxh3_64_hexdigest(content[e.start : e.end]) for t, e in entries.items()} == entry["xxh3"]
    assert manifest["options"] == {
        "tau": 0.1,
        "eps": 1e-8,
        "rate": "relative",
        "select_by": "rate",
        "out_dtype": "pivot",
        "warn_below": 0.05,
    }
    assert [model["folder"] for model in manifest["models"]] == list(map(str, folders))
    card = (out / "README.md").read_text()
    assert all(str(word) in card for word in ("rsaf_literal", pivot.folder, *folders, "tau: 0.1", "**Warning**"))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (pivot.folder / name).read_bytes()


def test_a_dry_run_tells_bytes_time_and_memory_and_writes_nothing(tmp_path, pivot, folders):
    done = command(
        "--method",
        "sce",
        "--pivot",
        pivot.folder,
        "--models",
        *folders,
        "--out",
        tmp_path / "out",
        "--dry-run",
        code=("-c", WITHOUT_KERNELS),
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "sce of 2 models",
        "tensors with",
        "reads",
        "GB are free",
        "s on 1 threads",
        "MiB of memory",
        "nothing was written",
    ):
        assert words in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def test_a_merge_that_is_killed_is_continued_by_the_same_command(tmp_path, pivot, folders):
    words = ["--method", "ties", "--pivot", pivot.folder, "--models", *folders, "--out"]
    assert command(*words, tmp_path / "whole", "--threads", "1").returncode == 0
    for after in (0, 3, 9):  # tensors
        killed = command(
            *words,
            tmp_path / "out",
            "--threads",
            "1",
            code=("-c", WITHOUT_TORCH.replace("main.entry", DIES.replace("AFTER", str(after)) + "main.entry", 1)),
        )
        assert killed.returncode == -9
        assert not (tmp_path / "out").exists()
    done = command(*words, tmp_path / "out", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2", "out", "whole"}


def test_a_model_too_large_for_the_disk_is_refused_before_work(tmp_path, pivot, folders, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert merge("--method", "ta", "--pivot", pivot.folder, "--models", *folders, "--out", tmp_path / "out") == 2
    assert re.search(r"the merge needs \d+ KiB more, 1 KiB are free in", capsys.readouterr().err)
    assert {p.name for p in tmp_path.iterdir()} == {"m1", "m2"}


def eight_billion(folder, rows, layers=32):
    """An 8B checkpoint of zeros in bfloat16, as a hole in the disk; its header is real."""
    shapes = {"model.embed_tokens.weight": (rows, 4096), "lm_head.weight": (rows, 4096), "model.norm.weight": (4096,)}
    for i in range(layers):
        for name, shape in (
            ("self_attn.q", (4096, 4096)),
            ("self_attn.k", (1024, 4096)),
            ("mlp.up", (14336, 4096)),
            ("mlp.down", (4096, 14336)),
        ):
            shapes[f"model.layers.{i}.{name}_proj.weight"] = shape
    folder.mkdir()
    layout = layout_of(folder / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}, None)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(layout.head)
        file.truncate(layout.size)
    return folder


def test_a_mismatch_of_8b_models_is_refused_from_headers_alone(tmp_path):
    pivot, wide, short = (
        eight_billion(tmp_path / "p", 128256),
        eight_billion(tmp_path / "m1", 128320),
        eight_billion(tmp_path / "m2", 128256, 31),
    )
    place, before = tmp_path / "out", resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["--method", "rsaf", "--pivot", pivot, "--models", wide, short, "--out", place]
    done = command(
        *words,
        code=(
            "-c",
            WITHOUT_KERNELS
            + "\nprint(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))",
        ),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "6 differences" in done.stderr
    assert f"lm_head.weight is [128320, 4096] in {wide} and [128256, 4096] in the pivot {pivot}" in done.stderr
    assert f"model.layers.31.mlp.up_proj.weight is missing in {short}" in done.stderr
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    )  # CPU seconds, the interpreter's start included
    assert int(done.stdout.split()[-1]) < 200 * 1024


def test_compiled_code_goes_where_the_environment_says_and_to_a_private_folder_where_home_cannot_be_written(tmp_path):
    code = "from llmfusion.merging.compiled import cache_folder; print(cache_folder())"
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.write_text("a file: no folder can be made in it")
    temporary.mkdir()
    plain = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}

    def folder_with(**changed):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **changed})
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert folder_with(NUMBA_CACHE_DIR=str(tmp_path / "given")) == str(tmp_path / "given")
    assert folder_with(XDG_CACHE_HOME=str(tmp_path / "xdg")) == str(tmp_path / "xdg/llmfusion")
    assert folder_with(HOME=str(tmp_path)) == str(tmp_path / ".cache/llmfusion")
    private = folder_with(HOME=str(home), TMPDIR=str(temporary))
    assert os.path.dirname(private) == str(temporary)
    assert os.stat(private).st_mode & 0o777 == 0o700


def test_a_step_that_was_killed_goes_on_with_the_next_tensor(tmp_path, pivot, folders, monkeypatch):
    from llmfusion.merging import engine

    spec = {"merge": {"method": "sce", "pivot": "base/p", "parents": ["trained/a", "trained/b"]}}
    inputs = {
        "models/base/p": pivot,
        "models/trained/a": artifact(folders[0]),
        "models/trained/b": artifact(folders[1]),
    }
    whole = job(tmp_path, spec, inputs, "whole")
    build(whole)
    merge_tensor, seen = engine._merge_tensor, []

    def dies(plan, tensor, *rest):
        seen.append(tensor.name)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return merge_tensor(plan, tensor, *rest)

    monkeypatch.setattr(engine, "_merge_tensor", dies)
    with pytest.raises(KeyboardInterrupt):
        build(job(tmp_path, spec, inputs, "killed"))
    assert not list((tmp_path / "killed/out").iterdir())
    finished = seen[:4]
    seen.clear()
    monkeypatch.setattr(
        engine,
        "_merge_tensor",
        lambda plan, tensor, *rest: seen.append(tensor.name) or merge_tensor(plan, tensor, *rest),
    )
    again = job(tmp_path, spec, inputs, "killed")
    build(again)
    assert sorted(seen) == sorted(set(read_checkpoint_headers(pivot.folder)) - set(finished))
    assert {p.name: p.read_bytes() for p in again.folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.folder.iterdir()
    }
    assert not list(again.work.iterdir())
