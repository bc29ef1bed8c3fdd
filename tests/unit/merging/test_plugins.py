"""Merge methods as plug-ins: what a file must hold, what it sees, and what holds for every registered method."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from llmfusion.cli.main import main
from llmfusion.errors import UserError
from llmfusion.merging import engine
from llmfusion.merging.arrays import merge_arrays
from llmfusion.merging.blocks import BLOCK, count_layers, layer_of
from llmfusion.merging.options import options_of
from llmfusion.merging.plan import plan_merge
from llmfusion.study import merge_methods
from llmfusion.study.errors import from_pydantic
from llmfusion.study.merge_methods import load_method, method_names, method_summary
from llmfusion.study.plugins import PluginError
from llmfusion.study.schema.merging import Merge
from llmfusion.study.schema.options import MergeOptions
from tests.unit.plugin_files import write_plugins

every_method = pytest.mark.parametrize("name", method_names())

METHOD = '''"""A random share of the mean delta."""

from typing import Literal

from pydantic import Field

from llmfusion.io.lazy import np
from llmfusion.merging.blocks import Array, Block, PivotDeltas, TensorMerge
from llmfusion.study.schema.options import MergeOptions


class Options(MergeOptions):
    method: Literal["written"] = Field(description="a test's")
    seed: int = Field(0, description="of the random shares")


def merge(tensor: PivotDeltas, options: Options) -> TensorMerge:
    generator = np.random.default_rng([options.seed, tensor.seed])
    share = np.float32(generator.random())
    SEEN.append((tensor.name, tensor.layer, tensor.layers, tensor.shape, tensor.seed))

    def merge_block(block: Block) -> Array:
        return block.theta + share * block.deltas.mean(axis=0)

    return TensorMerge(merge_block, {"share": float(share)})


SEEN = []
'''


@pytest.fixture
def write_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a file the only merge method there is."""

    def write(source: str, name: str = "written") -> None:
        monkeypatch.setattr(merge_methods, "PACKAGE", write_plugins(tmp_path, monkeypatch, **{name: source}))
        load_method.cache_clear()

    yield write
    load_method.cache_clear()


def arrays(models: int = 3, n: int = 501) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 0.02, n).astype(np.float32), rng.normal(0, 1e-3, (models, n)).astype(np.float32)


# -------------------------------------------------------------------------------------------------- every method
@every_method
def test_a_method_without_deltas_gives_the_pivot(name: str) -> None:
    theta, deltas = arrays()
    assert np.array_equal(merge_arrays(name, theta, list(deltas * 0), deltas=True)[0], theta)


@every_method
def test_a_method_gives_the_same_bits_twice_and_leaves_its_inputs_alone(name: str) -> None:
    theta, deltas = arrays(n=2 * BLOCK + 17)
    before = (theta.copy(), deltas.copy())
    one, other = (merge_arrays(name, theta, list(deltas), deltas=True, name="h.0.w", layers=1) for _ in range(2))
    assert one[0].tobytes() == other[0].tobytes()
    assert one[1] == other[1]
    assert np.array_equal(theta, before[0])
    assert np.array_equal(deltas, before[1])
    assert np.isfinite(one[0]).all()


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (20, 30)])
def test_a_method_keeps_the_shape_and_notes_the_same_of_every_tensor(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    theta, *models = (rng.normal(0, 1, shape).astype(np.float32) for _ in range(3))
    out, notes = merge_arrays(name, theta, models)
    assert (out.shape, out.dtype) == (shape, np.float32)
    assert list(notes) == list(merge_arrays(name, *arrays(2), deltas=True)[1])


@every_method
def test_a_method_is_in_the_schema_with_a_sentence_and_described_options(name: str) -> None:
    options = load_method(name).Options
    assert options in get_args(get_args(Merge)[0])
    assert len(method_summary(name)) > 10
    assert options.seconds_per_value > 0
    assert all(key.get("description") for key in options.model_json_schema()["properties"].values())


@every_method
def test_a_method_is_imported_without_numpy_numba_and_torch(name: str) -> None:
    code = f"""
import sys
from llmfusion.study.merge_methods import load_method
load_method({name!r})
sys.exit(str([module for module in ("numpy", "numba", "torch") if module in sys.modules] or ""))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_the_help_lists_every_method_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(f"{name} {method_summary(name)}" in lines for name in method_names())


# ------------------------------------------------------------------------------------------- what a file must hold
INCOMPLETE = {
    "no docstring": (METHOD[METHOD.index("from typing") :], "missing: a docstring"),
    "no function": (METHOD.replace("def merge(", "def fuse("), "missing: merge"),
    "no options": (
        METHOD.replace("class Options", "class Settings").replace(": Options", ": Settings"),
        "missing: Options",
    ),
    "another name": (
        METHOD.replace('["written"]', '["other"]'),
        r'Options.method: Literal\["written"\], as the file is named',
    ),
    "no name": (METHOD.replace('method: Literal["written"]', "name: str"), r'Options.method: Literal\["written"\]'),
    "other options": (METHOD.replace("(MergeOptions)", ""), r"needs: class Options\(MergeOptions\)"),
    "other arguments": (
        METHOD.replace("tensor: PivotDeltas, options", "options"),
        r"needs: def merge\(tensor, options\)",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_file_with_something_missing_is_refused_before_work(write_method: Any, case: str) -> None:
    source, message = INCOMPLETE[case]
    write_method(source)
    with pytest.raises(PluginError, match=rf"(?s)written\.py: .*{message}"):
        load_method("written")


def test_a_merge_by_hand_with_an_incomplete_method_says_what_is_missing(
    write_method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_method(INCOMPLETE["no function"][0])
    words = ["--pivot", str(tmp_path), "--models", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["merge", "--method", "written", *words]) == 2
    assert "error: " in (message := capsys.readouterr().err)
    assert "missing: merge" in message


# ------------------------------------------------------------------------------------------------ what a method sees
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("h.3.ln_1.weight", 3),
        ("transformer.h.0.attn.c_attn.bias", 0),
        ("gpt_neox.layers.3.attention.dense.weight", 3),
        ("encoder.layer.7.output.dense.weight", 7),
        ("visual.blocks.5.norm1.weight", 5),
        ("model.layers.2.mlp.experts.9.w1.weight", 2),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layers.norm.weight", None),
        ("math.3.weight", None),
    ],
)
def test_the_layer_is_read_from_the_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_layers_are_counted_over_all_names() -> None:
    assert count_layers(["model.norm.weight", "model.layers.0.a", "model.layers.11.a", "model.layers.2.a"]) == 12
    assert count_layers(["lm_head.weight"]) == 0


def test_a_method_sees_name_layer_shape_and_a_seed_whatever_the_number_of_threads(
    write_method: Any, tmp_path: Path
) -> None:
    write_method(METHOD)
    shapes = {"model.layers.0.w": (4, 3), "model.layers.1.w": (4, 3), "lm_head.weight": (5,)}
    folders = [tmp_path / name for name in ("pivot", "m1")]
    for j, folder in enumerate(folders):
        folder.mkdir()
        save_file({name: torch.ones(shape) + j for name, shape in shapes.items()}, folder / "model.safetensors")
    weights = {}
    for seed, threads in ((0, 1), (0, 3), (1, 1)):
        plan = plan_merge(folders[0], folders[1:], options_of("written", {"seed": seed} if seed else {}, 1))
        out = tmp_path / f"{seed}{threads}"
        engine.run(plan, out, "key", threads)
        weights[seed, threads] = (out / "model.safetensors").read_bytes()
    assert weights[0, 1] == weights[0, 3]
    assert weights[0, 1] != weights[1, 1]
    seen = {name: details for name, *details in load_method("written").SEEN}
    assert {name: details[:3] for name, details in seen.items()} == {
        "model.layers.0.w": [0, 2, (4, 3)],
        "model.layers.1.w": [1, 2, (4, 3)],
        "lm_head.weight": [None, 2, (5,)],
    }
    assert len({details[3] for details in seen.values()}) == 3
    assert seen["lm_head.weight"][3] == int(hashlib.sha256(b"lm_head.weight").hexdigest()[:16], 16)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ('{"kept": 1.0}', "a note cannot be called kept: the report has it"),
        ("{tensor.name[-1]: 1.0}", "a method gives the same for every tensor"),
    ],
)
def test_notes_that_the_report_cannot_hold_stop_the_merge(
    write_method: Any, tmp_path: Path, notes: str, message: str
) -> None:
    write_method(METHOD.replace('{"share": float(share)}', notes))
    folders = [tmp_path / name for name in ("pivot", "m1")]
    for j, folder in enumerate(folders):
        folder.mkdir()
        save_file({name: torch.ones(4) + j for name in ("a", "b")}, folder / "model.safetensors")
    plan = plan_merge(folders[0], folders[1:], options_of("written", {}, 1))
    with pytest.raises(UserError, match=message):
        engine.run(plan, tmp_path / "out", "key", 1)


# ------------------------------------------------------------------------------------------------ options
def test_arrays_are_merged_with_an_instance_of_options_or_their_names() -> None:
    theta, deltas = arrays()
    options = load_method("ta").Options(method="ta", pivot="base/p", parents=["trained/a"], **{"lambda": 0.5})
    one = merge_arrays("ta", theta, list(deltas), options, deltas=True)[0]
    assert np.array_equal(one, merge_arrays("ta", theta, list(deltas), {"lambda": 0.5}, deltas=True)[0])
    assert not np.array_equal(one, merge_arrays("ta", theta, list(deltas), deltas=True)[0])


MISTAKES = [
    {"method": "ta", "tau": 0.1},
    {"method": "ta", "lamda": 0.1, "weight": "big"},
    {"method": "ties", "density": 2.0, "weight": [0.5, "x"]},
    {"method": "rsaf", "rate": "logs", "select_scope": 3, "eps": 0.0},
    {"method": "sce", "out_dtype": "int8", "warn_below": True},
]


@pytest.mark.parametrize("mistakes", MISTAKES, ids=str)
def test_mistakes_are_reported_in_the_words_of_a_study(mistakes: dict[str, Any]) -> None:
    entry = {"pivot": "base/pivot", "parents": ["trained/0", "trained/1"], **mistakes}
    study: TypeAdapter[MergeOptions] = TypeAdapter(Merge)
    with pytest.raises(ValidationError) as invalid:
        study.validate_python(entry)
    problems = from_pydantic(invalid.value, entry, study.json_schema())
    own = {key: value for key, value in mistakes.items() if key != "method"}
    with pytest.raises(UserError) as refused:
        options_of(mistakes["method"], own, 2)
    assert sorted(str(refused.value).split("\n  ")) == sorted(
        f"{'.'.join(map(str, p.key))}: {p.text}" for p in problems
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [("soup", f"there are: {', '.join(method_names())}"), ("tie", "did you mean 'ties'?")],
)
def test_an_unknown_method_is_refused_with_the_nearest_name(method: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        options_of(method, {}, 2)
    assert str(refused.value).startswith(f"method: got {method!r} (str); ")
    assert message in str(refused.value)
