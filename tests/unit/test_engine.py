import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfusion.errors import UserError
from llmfusion.merging.engine import merge
from llmfusion.models.loading import load_model, load_tokenizer
from tests.unit.stand_ins import artifact


def folder_of(place, tensors, **files):
    place.mkdir()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (place / f"{name}.json").write_text(text)
    return place


def merged(pivot, models, out, method="ta", **options):
    out.mkdir()
    return merge(pivot, models, method, options, out), load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else None


@pytest.fixture
def models(tmp_path):
    """A pivot and two models around it, with numbers of other kinds than floating point."""
    generator = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator), "none": torch.zeros(0, 3), "one": torch.tensor(1.5)}
    folders = [folder_of(tmp_path / "pivot", {**theta, "steps": torch.tensor([7]), "flags": torch.tensor([True, False])}, config='{"a": 1}')]
    for j in (1, 2):
        phi = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in theta.items()}
        folders.append(folder_of(tmp_path / f"m{j}", {**phi, "steps": torch.tensor([j]), "flags": torch.tensor([False, False])}, config='{"b": 2}'))
    return folders


def test_a_merge_is_that_of_its_tensors_in_float64_and_copies_the_rest_from_the_pivot(tmp_path, models):
    pivot, *others = models
    facts, found = merged(pivot, others, tmp_path / "out", weight=[0.3, 0.5])
    theta, *phi = (load_file(m / "model.safetensors") for m in models)
    for name in ("w", "b", "one", "none"):
        t = theta[name].double()
        expected = t + 0.3 * (phi[0][name].double() - t) + 0.5 * (phi[1][name].double() - t)
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(found[name], theta[name]) for name in ("steps", "flags"))
    assert facts == {"tensors": 4, "parameters": 18, "changed": 1.0}
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    report = {row["tensor"]: row for row in csv.DictReader((tmp_path / "out" / "merge_report.csv").read_text().splitlines())}
    norms = [float((p["w"] - theta["w"]).norm()) for p in phi]
    assert list(map(float, report["w"]["delta_norms"].split())) == pytest.approx(norms, rel=1e-5)
    assert float(report["w"]["merged_norm"]) == pytest.approx(float((found["w"] - theta["w"]).norm()), rel=1e-5)


def test_the_share_that_changed_counts_values(tmp_path):
    pivot = folder_of(tmp_path / "p", {"a": torch.zeros(6), "b": torch.zeros(2)})
    model = folder_of(tmp_path / "m", {"a": torch.tensor([1.0, 0, 0, 0, 0, 0]), "b": torch.ones(2)})
    assert merged(pivot, [model], tmp_path / "out")[0]["changed"] == pytest.approx(3 / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parents_of_the_pivots_dtype_are_merged_in_float32_and_rounded_once(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(500, generator=generator).to(dtype) for _ in range(3)]
    folders = [folder_of(tmp_path / str(i), {"w": t}) for i, t in enumerate(tensors)]
    _, found = merged(folders[0], folders[1:], tmp_path / "out")
    theta, one, two = (t.float() for t in tensors)
    assert torch.equal(found["w"], (theta + ((one - theta) + (two - theta)) / 2).to(dtype))


def test_float32_parents_on_a_bfloat16_pivot_are_rounded_once_at_the_end(tmp_path):
    theta = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    pivot = folder_of(tmp_path / "p", {"w": theta})
    parents = [folder_of(tmp_path / str(d), {"w": theta.float() + d}) for d in (1e-3, 3e-3)]
    _, found = merged(pivot, parents, tmp_path / "out")
    assert found["w"].dtype == torch.bfloat16
    exact = theta.double() + 2e-3  # each parent alone would be rounded elsewhere
    assert torch.equal(found["w"], exact.to(torch.bfloat16))


def test_all_shards_of_the_pivot_are_written_under_their_names(tmp_path):
    pivot = folder_of(tmp_path / "p", {"a": torch.zeros(2)})
    (pivot / "model.safetensors").rename(pivot / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, pivot / "model-00002-of-00002.safetensors")
    model = folder_of(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(3)})  # other shards than the pivot's
    merged(pivot, [model], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["a"].tolist() == [1, 1]
    assert load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")["b"].tolist() == [1, 1, 1]


def test_all_differences_in_names_and_shapes_are_told_at_once_with_their_folders(tmp_path):
    pivot = folder_of(tmp_path / "p", {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)})
    one = folder_of(tmp_path / "m1", {"a": torch.zeros(2), "c": torch.zeros(4, 1), "d": torch.zeros(1)})
    two = folder_of(tmp_path / "m2", {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(4)})
    with pytest.raises(UserError) as told:
        merged(pivot, [one, two], tmp_path / "out")
    lines = str(told.value).splitlines()
    assert "4 differences" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        f"b is missing in {one}",
        f"d of {one} is not in the pivot {pivot}",
        f"c is [4, 1] in {one} and [4] in the pivot {pivot}",
        f"a is [3] in {two} and [2] in the pivot {pivot}",
    ]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("pivots", "models"), [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32, torch.int8), (torch.float8_e4m3fn, torch.float32)]
)
def test_a_kind_of_number_that_cannot_be_merged_is_refused_not_copied(tmp_path, pivots, models):
    pivot, model = folder_of(tmp_path / "p", {"w": torch.zeros(2).to(pivots)}), folder_of(tmp_path / "m", {"w": torch.ones(2).to(models)})
    with pytest.raises(UserError, match=r"w .*(F64|I8|F8_E4M3)"):
        merged(pivot, [model], tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_value_that_is_not_finite_is_refused_with_file_and_tensor(tmp_path, place, value):
    tensors = [torch.zeros(3), torch.ones(3)]
    tensors[place][1] = value
    pivot, model = (folder_of(tmp_path / str(i), {"w": t}) for i, t in enumerate(tensors))
    with pytest.raises(UserError, match=f"{tmp_path / str(place)}.*: tensor w holds a NaN or an infinity"):
        merged(pivot, [model], tmp_path / "out")


def test_a_merge_that_overflows_its_dtype_is_refused(tmp_path):
    pivot, model = folder_of(tmp_path / "p", {"w": torch.zeros(2).half()}), folder_of(tmp_path / "m", {"w": torch.full((2,), 60000.0).half()})
    with pytest.raises(UserError, match="tensor w: the merge is not finite"):
        merged(pivot, [model], tmp_path / "out", weight=1.5)


def test_an_unknown_method_and_a_folder_without_weights_are_refused(tmp_path, models):
    with pytest.raises(UserError, match=r"merge method 'soup' is not built in this version; built: ta"):
        merged(models[0], models[1:], tmp_path / "a", method="soup")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no \.safetensors weights"):
        merged(tmp_path / "empty", models[1:], tmp_path / "b")


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_merged_model_loads_in_transformers_with_equal_tensors(tmp_path, pivot, tied_teacher, kind):
    source = {"untied": pivot, "tied": tied_teacher}[kind]
    other = shutil.copytree(source.folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: t + 0.5 for name, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    merged(source.folder, [other], tmp_path / "out", weight=0.5)
    model = load_model(artifact(tmp_path / "out"), "float32")
    state = model.state_dict()
    assert all(torch.allclose(state[name], t + 0.25, atol=1e-6) for name, t in tensors.items())
    assert model.config.to_dict() == load_model(source, "float32").config.to_dict() | {"_name_or_path": model.config._name_or_path}
    assert load_tokenizer(tmp_path / "out", None).chat_template == load_tokenizer(source, None).chat_template


def test_weights_of_other_formats_and_notes_of_the_pivot_are_not_handed_on(tmp_path, models):
    for name in ("pytorch_model.bin", "old.gguf", "manifest.json", "provenance.json", "metrics.jsonl"):
        (models[0] / name).write_text("{}")
    merged(models[0], models[1:], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "merge_report.csv"}


def test_the_index_of_shards_is_the_pivots(tmp_path, models):
    (models[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    merged(models[0], models[1:], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == {"w": "model.safetensors"}
