import csv
import json
import shutil
import sys
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmfusion.cli.merge import progress_line
from llmfusion.errors import UserError
from llmfusion.merging import engine
from llmfusion.merging.arrays import merge_arrays
from llmfusion.merging.options import options_of
from llmfusion.merging.plan import MergePlan, plan_merge
from llmfusion.models.loading import load_model, load_tokenizer
from tests.unit.stand_ins import artifact


def folder_of(place, tensors, **files):
    place.mkdir()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (place / f"{name}.json").write_text(text)
    return place


def plan_of(pivot, models, method="ta", **options) -> MergePlan:
    """A checked merge with these options, by their names in a study."""
    return plan_merge(pivot, models, options_of(method, options, len(models)))


def merged(pivot, models, out, method="ta", **options):
    facts, _ = engine.run(plan_of(pivot, models, method, **options), out, "key")
    return facts, load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else None


@pytest.fixture
def models(tmp_path):
    """A pivot and two models around it, with numbers of other kinds than floating point."""
    generator = torch.Generator().manual_seed(0)
    theta = {
        "w": torch.randn(4, 3, generator=generator),
        "b": torch.randn(5, generator=generator),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1.5),
    }
    folders = [
        folder_of(
            tmp_path / "pivot",
            {**theta, "steps": torch.tensor([7]), "flags": torch.tensor([True, False])},
            config='{"a": 1}',
        )
    ]
    for j in (1, 2):
        phi = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in theta.items()}
        folders.append(
            folder_of(
                tmp_path / f"m{j}",
                {**phi, "steps": torch.tensor([j]), "flags": torch.tensor([False, False])},
                config='{"b": 2}',
            )
        )
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
    assert facts == {"tensors": 4, "parameters": 18, "changed": 1.0, "kept": 1.0}
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    report = {
        row["tensor"]: row for row in csv.DictReader((tmp_path / "out" / "merge_report.csv").read_text().splitlines())
    }
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


def test_all_differences_in_names_and_shapes_are_reported_at_once_with_their_folders(tmp_path):
    pivot = folder_of(tmp_path / "p", {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)})
    one = folder_of(tmp_path / "m1", {"a": torch.zeros(2), "c": torch.zeros(4, 1), "d": torch.zeros(1)})
    two = folder_of(tmp_path / "m2", {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(4)})
    with pytest.raises(UserError) as refused:
        merged(pivot, [one, two], tmp_path / "out")
    lines = str(refused.value).splitlines()
    assert "4 differences" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == [
        f"a is [3] in {two} and [2] in the pivot {pivot}",
        f"b is missing in {one}",
        f"c is [4, 1] in {one} and [4] in the pivot {pivot}",
        f"d of {one} is not in the pivot {pivot}",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pivots", "models"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float32, torch.int8),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_a_kind_of_number_that_cannot_be_merged_is_refused_not_copied(tmp_path, pivots, models):
    pivot, model = (
        folder_of(tmp_path / "p", {"w": torch.zeros(2).to(pivots)}),
        folder_of(tmp_path / "m", {"w": torch.ones(2).to(models)}),
    )
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
    pivot, model = (
        folder_of(tmp_path / "p", {"w": torch.zeros(2).half()}),
        folder_of(tmp_path / "m", {"w": torch.full((2,), 60000.0).half()}),
    )
    with pytest.raises(UserError, match="tensor w: the merge is not finite"):
        merged(pivot, [model], tmp_path / "out", weight=1.5)


def test_rows_and_buffers_that_are_only_copied_must_fit_the_dtype_too(tmp_path):
    pivot = folder_of(tmp_path / "p", {"w": torch.zeros(2), "rotary.inv_freq": torch.full((2,), 1e6)})
    model = folder_of(tmp_path / "m", {"w": torch.ones(2)})
    assert merged(pivot, [model], tmp_path / "wide", out_dtype="bfloat16")[1]["rotary.inv_freq"].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"tensor rotary.inv_freq: the merge is not finite in F16"):
        merged(pivot, [model], tmp_path / "out", out_dtype="float16")


def test_a_folder_without_weights_is_refused(tmp_path, models):
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
    assert model.config.to_dict() == load_model(source, "float32").config.to_dict() | {
        "_name_or_path": model.config._name_or_path
    }
    assert load_tokenizer(tmp_path / "out", None).chat_template == load_tokenizer(source, None).chat_template


def test_weights_of_other_formats_and_notes_of_the_pivot_are_not_handed_on(tmp_path, models):
    for name in ("pytorch_model.bin", "old.gguf", "manifest.json", "provenance.json", "metrics.jsonl"):
        (models[0] / name).write_text("{}")
    merged(models[0], models[1:], tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "merge_report.csv",
        "merge_report.json",
    }


def sharded(folder, tensors):
    """The same tensors in a file each, with an index."""
    folder.mkdir()
    names = {name: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": names})
    )
    return folder


def test_the_index_of_shards_is_the_pivots(tmp_path):
    tensors = {"a": torch.zeros(2).bfloat16(), "b": torch.zeros(3).bfloat16()}
    pivot, model = (
        sharded(tmp_path / "p", tensors),
        folder_of(tmp_path / "m", {name: t + 1 for name, t in tensors.items()}),
    )
    merged(pivot, [model], tmp_path / "out")
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (pivot / index).read_bytes()
    merged(pivot, [model], tmp_path / "wide", out_dtype="float32")
    written = json.loads((tmp_path / "wide" / index).read_text())
    assert written == {
        "metadata": {"total_size": 20},
        "weight_map": json.loads((pivot / index).read_text())["weight_map"],
    }


# ------------------------------------------------------------------------------------------------ what is written
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_merge_is_written_in_the_dtype_asked_for(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    theta, one, two = (torch.randn(70_001, generator=generator).bfloat16() for _ in range(3))
    folders = [
        folder_of(tmp_path / str(i), {"w": t, "n": torch.tensor([3])}) for i, t in enumerate((theta, one, two.float()))
    ]
    _, found = merged(folders[0], folders[1:], tmp_path / "out", out_dtype=dtype)
    exact = theta.float() + ((one.float() - theta.float()) * 0.5 + (two.float() - theta.float()) * 0.5)
    assert found["w"].dtype == getattr(torch, dtype)
    assert torch.equal(found["w"], exact.to(getattr(torch, dtype)))
    assert found["n"].tolist() == [3]


@pytest.mark.parametrize(
    ("method", "options"), [("ta", {}), ("ties", {}), ("sce", {}), ("rsaf", {}), ("rsaf_literal", {})]
)
def test_any_number_of_threads_gives_the_same_bytes(tmp_path, method, options):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 250), "b": (40_000,), "c": (1,), "d": (7, 11), "e": (200_000,)}
    theta = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    others = [
        {name: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).bfloat16() for name, t in theta.items()}
        for _ in range(3)
    ]
    pivot, *models = (folder_of(tmp_path / str(i), tensors) for i, tensors in enumerate((theta, *others)))
    for threads in (1, 2, 7):
        engine.run(plan_of(pivot, models, method, **options), tmp_path / f"out{threads}", "key", threads)
    one, *more = ({p.name: p.read_bytes() for p in (tmp_path / f"out{threads}").iterdir()} for threads in (1, 2, 7))
    assert all(other == one for other in more)


def test_a_merge_has_the_rights_of_its_sources_and_hidden_chat_templates_come_along(tmp_path, models):
    (models[0] / "additional_chat_templates").mkdir()
    (models[0] / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    for model in models:
        (model / "model.safetensors").chmod(0o644)
    (models[0] / "config.json").chmod(0o600)
    merged(models[0], models[1:], tmp_path / "out")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"tools.jinja", "config.json", "model.safetensors"}
    private = {p.name for p in files if p.stat().st_mode & 0o777 == 0o600}
    assert private == {"config.json"}
    assert {p.stat().st_mode & 0o777 for p in files if p.name not in private} == {0o644}
    models[2].joinpath("model.safetensors").chmod(0o640)  # of a model's weights: all that is made from them
    merged(models[0], models[1:], tmp_path / "more")
    assert (tmp_path / "more" / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_report_tells_what_a_hand_count_finds(tmp_path):
    pivot = folder_of(tmp_path / "p", {"w": torch.tensor([1.0, 1, 1, 1])})
    one = folder_of(tmp_path / "m1", {"w": torch.tensor([5.0, 1, 2, 1])})
    two = folder_of(tmp_path / "m2", {"w": torch.tensor([1.0, 1, 0, 3])})
    merged(pivot, [one, two], tmp_path / "out", "sce", tau=0.5, select_scope="values")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    (row,) = report["tensors"]
    # deltas 4 0 1 0 and 0 0 -1 2; variances 4 0 1 1: one of three positions, the first
    assert (row["k"], row["threshold"], row["eta_0"], row["eta_1"]) == (1, pytest.approx(2, rel=1e-7), 1, 0)
    assert (row["sign_conflicts"], row["changed"], row["kept"]) == (0.25, 0.25, 16 / 22)
    assert (row["nonzero"], row["merged_norm"]) == ("0.5 0.5", "4")
    assert report["totals"] == {"tensors": 1, "parameters": 4, "changed": 0.25, "kept": 16 / 22}
    (line,) = csv.DictReader((tmp_path / "out" / "merge_report.csv").read_text().splitlines())
    assert float(line["kept_energy"]) == 16 / 22


def test_a_merge_that_is_nearly_the_pivot_says_so_with_the_figure(tmp_path):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(20_000, generator=generator) * 0.02
    folders = [
        folder_of(tmp_path / str(i), {"w": theta + (i > 0) * 1e-4 * torch.randn(20_000, generator=generator)})
        for i in range(3)
    ]
    facts, _ = merged(folders[0], folders[1:], tmp_path / "literal", "rsaf_literal")
    assert facts["kept"] < 0.01
    assert f"rsaf_literal kept {facts['kept']:.3%} of the sum of squares" in facts["warning"]
    assert "warning" not in merged(folders[0], folders[1:], tmp_path / "default", "rsaf")[0]
    assert "warning" not in merged(folders[0], folders[1:], tmp_path / "quiet", "rsaf_literal", warn_below=0.0)[0]


# -------------------------------------------------------------------------------- what transformers does not read
def test_redundant_heads_buffers_and_prefixes_are_no_differences(tmp_path):
    table, body = torch.arange(6.0).view(3, 2), torch.ones(2)
    hub = {
        "wte.weight": table,
        "h.0.ln_1.weight": body,
        "lm_head.weight": table.clone(),
        "h.0.attn.bias": torch.ones(1, 1, 2, 2),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "rotary_emb.inv_freq": torch.ones(4),
    }
    trained = {"transformer.wte.weight": table + 1, "transformer.h.0.ln_1.weight": body + 1}
    pivot = folder_of(
        tmp_path / "p", hub, config='{"model_type": "gpt2"}'
    )  # ties by default: nothing says so but the bytes
    model = folder_of(tmp_path / "m", trained, config='{"model_type": "gpt2"}')
    _, found = merged(pivot, [model], tmp_path / "out")
    assert torch.equal(found["wte.weight"], table + 1)
    assert torch.equal(found["lm_head.weight"], table + 1)
    assert torch.equal(found["h.0.ln_1.weight"], body + 1)
    assert all(torch.equal(found[name], hub[name]) for name in hub if "attn" in name or "inv_freq" in name)
    back = merged(model, [pivot], tmp_path / "back")[1]  # the other way round: the pivot has no head
    assert set(back) == set(trained)
    assert torch.equal(back["transformer.wte.weight"], table)


@pytest.mark.parametrize("tie", ["false", None])
def test_a_head_that_is_missing_or_one_of_its_own_is_a_difference(tmp_path, tie):
    config = "{}" if tie is None else f'{{"tie_word_embeddings": {tie}}}'
    full = {"model.embed_tokens.weight": torch.zeros(3, 2), "lm_head.weight": torch.ones(3, 2)}
    both = folder_of(tmp_path / "both", full, config='{"x": 1}' if tie is None else config)
    without = folder_of(
        tmp_path / "without",
        {"model.embed_tokens.weight": torch.zeros(3, 2)},
        config='{"x": 1}' if tie is None else config,
    )
    with pytest.raises(UserError, match=rf"lm_head.weight is missing in {without}"):
        merged(both, [without], tmp_path / "out")
    with pytest.raises(UserError, match=rf"lm_head.weight of {both} is not in the pivot {without}"):
        merged(without, [both], tmp_path / "out")


def tokenizer(folder, tokens):
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {token: i for i, token in enumerate(tokens)}}})
    )


def test_rows_of_tokens_that_both_have_are_merged_and_the_others_are_the_pivots(tmp_path):
    pivot = folder_of(tmp_path / "p", {"model.embed_tokens.weight": torch.zeros(4, 2).bfloat16()})
    longer = folder_of(tmp_path / "m1", {"model.embed_tokens.weight": torch.ones(6, 2).bfloat16()})
    shorter = folder_of(tmp_path / "m2", {"model.embed_tokens.weight": torch.ones(3, 2).bfloat16()})
    with pytest.raises(
        UserError, match=rf"embed_tokens.weight is \[6, 2\] in {longer} and \[4, 2\] in the pivot"
    ):  # nobody can say which token a row is
        merged(pivot, [longer], tmp_path / "out")
    for folder, tokens in ((pivot, "abcd"), (longer, "abcdef"), (shorter, "abc")):
        tokenizer(folder, tokens)
    assert any(
        "only the rows of both are merged" in remark for remark in plan_of(pivot, [longer], "ta").matching.remarks
    )
    for dtype in ("pivot", "float32"):
        _, found = merged(pivot, [longer, shorter], tmp_path / dtype, out_dtype=dtype)
        assert found["model.embed_tokens.weight"].tolist() == [[1, 1]] * 3 + [[0, 0]]
    tokenizer(longer, "abdcef")
    with pytest.raises(
        UserError,
        match=rf"tokenizers differ in 2 tokens, the first with id 2: 'd' in {longer} and 'c' in the pivot {pivot}",
    ):
        merged(pivot, [longer], tmp_path / "other")


def test_settings_that_no_shape_shows_are_compared(tmp_path):
    pivot = folder_of(
        tmp_path / "p",
        {"w": torch.zeros(2)},
        config='{"architectures": ["A"], "num_attention_heads": 4, "rope_theta": 1e4}',
    )
    model = folder_of(
        tmp_path / "m",
        {"w": torch.ones(2)},
        config='{"architectures": ["A"], "num_attention_heads": 8, "rope_theta": 5e5}',
    )
    with pytest.raises(UserError) as refused:
        merged(pivot, [model], tmp_path / "out")
    assert f"num_attention_heads is 8 in {model} and 4 in the pivot {pivot}" in str(refused.value)
    (model / "config.json").write_text(
        '{"architectures": ["A"], "num_attention_heads": 4, "head_dim": 1, "rope_theta": 5e5}'
    )  # the pivot leaves head_dim out
    assert plan_of(pivot, [model], "ta").matching.remarks == [
        f"rope_theta is 500000.0 in {model} and 10000.0 in the pivot {pivot}; the merge has the pivot's"
    ]
    (model / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(UserError, match="m: its weights are quantised"):
        merged(pivot, [model], tmp_path / "out")


# ------------------------------------------------------------------------------------------------ killed and run again
def test_a_merge_goes_on_with_the_tensors_that_are_missing(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tensors = [{f"w{i}": torch.randn(50 + i, generator=generator) for i in range(6)} for _ in range(3)]
    pivot, *models = (folder_of(tmp_path / str(i), t) for i, t in enumerate(tensors))
    plan, whole, out = plan_of(pivot, models, "rsaf"), tmp_path / "whole", tmp_path / "out"
    engine.run(plan, whole, "key", 1)
    merge_tensor, seen = engine._merge_tensor, []

    def dies(plan, tensor, *rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(tensor.name)
        return merge_tensor(plan, tensor, *rest)

    monkeypatch.setattr(engine, "_merge_tensor", dies)
    with pytest.raises(KeyboardInterrupt):
        engine.run(plan, out, "key", 1)
    first = list(seen)
    damaged = plan.files["model.safetensors"].tensors[first[0]]
    content = bytearray((out / "model.safetensors").read_bytes())
    content[damaged.start : damaged.end] = bytes(
        damaged.end - damaged.start
    )  # finished, but lost with the machine's memory
    (out / "model.safetensors").write_bytes(content)
    with open(out / engine.JOURNAL, "a") as journal:
        journal.write('{"tensor": "w0", "do')
    seen.clear()
    monkeypatch.setattr(
        engine,
        "_merge_tensor",
        lambda plan, tensor, *rest: seen.append(tensor.name) or merge_tensor(plan, tensor, *rest),
    )
    engine.run(plan, out, "key", 1)
    assert sorted(seen) == sorted(set(tensors[0]) - set(first[1:]))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_what_another_merge_left_is_not_continued(tmp_path, models, monkeypatch):
    plan, out, seen, merge_tensor = plan_of(models[0], models[1:], "ta"), tmp_path / "out", [], engine._merge_tensor

    def leave():
        monkeypatch.setattr(engine, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.run(plan, out, "key", 1)
        monkeypatch.undo()

    for key, changed in (("other", plan), ("key", plan_of(models[0], models[1:], "ta", **{"lambda": 0.5}))):
        leave()
        seen.clear()
        monkeypatch.setattr(
            engine,
            "_merge_tensor",
            lambda plan, tensor, *rest: seen.append(tensor.name) or merge_tensor(plan, tensor, *rest),
        )
        engine.run(changed, out, key, 1)
        monkeypatch.undo()
        assert len(seen) == len(plan.tensors)
    leave()
    monkeypatch.setattr(engine, "_merge_tensor", lambda *_: pytest.fail("nothing was left to merge"))
    engine.run(plan, out, "key", 1)


# ------------------------------------------------------------------------------------------------ fuzz
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shapes_and_dtypes_are_merged_as_their_values(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("fuzz")
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    count = data.draw(st.integers(1, 3))
    all_tensors = [
        {f"w{i}": torch.randn(s, generator=generator).to(data.draw(dtypes)) for i, s in enumerate(shapes)}
        for _ in range(count + 1)
    ]
    folders = [folder_of(place / str(i), tensors) for i, tensors in enumerate(all_tensors)]
    method = data.draw(st.sampled_from(["ta", "ties", "sce", "rsaf", "rsaf_literal"]))
    _, found = merged(folders[0], folders[1:], place / "out", method)
    for name, theta in all_tensors[0].items():
        values = [tensors[name].float().numpy() for tensors in all_tensors]
        expected, _ = merge_arrays(method, values[0], values[1:])
        assert found[name].shape == theta.shape
        assert torch.equal(found[name], torch.tensor(expected).to(theta.dtype))


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    peaks = {}
    for rows in (64, 512):  # 4 and 32 blocks
        values = torch.arange(rows * 2048).remainder(251).view(rows, 2048).bfloat16()
        folders = [folder_of(tmp_path / f"{rows}-{j}", {"w": values + j}) for j in range(3)]
        for method in ("ta", "ties", "sce", "rsaf"):
            merged(folders[0], folders[1:], tmp_path / "warm", method)  # compiled, and what Python keeps
            tracemalloc.start()
            engine.run(plan_of(folders[0], folders[1:], method), tmp_path / f"{method}{rows}", "key", 1)
            peaks[method, rows] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    for method in ("ta", "ties", "sce", "rsaf"):
        assert peaks[method, 512] < peaks[method, 64] + 100_000  # each of the four files has 1.8 MB more


@pytest.mark.parametrize("broken", [0, 1])
def test_no_flipped_bit_of_a_header_is_merged_over(tmp_path, broken):
    folders = [
        folder_of(tmp_path / f"m{j}", {"layer.w": torch.ones(2, 3), "layer.b": torch.ones(4).half()}) for j in range(2)
    ]
    file = folders[broken] / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    about = whole.index(b'"__metadata__":') + 15  # what stands there is the writer's own
    for place in range(8 * length):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        if about <= place // 8 < whole.index(b"}", about) and place // 8 < length:
            continue
        with pytest.raises(UserError, match=rf"{folders[broken]}|layer\.[wb]"):
            plan_of(folders[0], folders[1:], "ta")


def test_the_progress_line_tells_the_share_and_gigabytes_a_second(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: 12.0)
    update = progress_line(10.0)
    update(1_000_000_000, 4_000_000_000)
    update(4_000_000_000, 4_000_000_000)
    assert capsys.readouterr().err == "\r 25% of 4.00 GB, 0.50 GB/s\r100% of 4.00 GB, 2.00 GB/s\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert progress_line(10.0) is None
    assert capsys.readouterr().err == ""


def test_progress_ends_with_all_bytes_read_and_written(tmp_path, models):
    calls = []
    plan = plan_of(models[0], models[1:], "ta")
    engine.run(plan, tmp_path / "out", "key", 1, lambda *bytes_done: calls.append(bytes_done))
    merged_bytes, copied = (
        4 * (12 + 5 + 1) * 4,
        2 * (8 + 2),
    )  # of pivot, two models and merge; integers and flags of pivot and merge
    assert calls[-1] == (merged_bytes + copied, merged_bytes + copied)
    assert [moved for moved, _ in calls] == sorted(moved for moved, _ in calls)


def test_the_report_of_rsaf_has_skewness_share_and_coefficients_of_each_model(tmp_path):
    pivot = folder_of(tmp_path / "p", {"w": torch.ones(4)})
    one, two = (
        folder_of(tmp_path / f"m{j}", {"w": 1 + torch.tensor(d)})
        for j, d in enumerate(([8.0, 0, 0, 0], [0, 1.0, 1, 1]))
    )
    merged(pivot, [one, two], tmp_path / "out", "rsaf", tau=0.3)
    (row,) = csv.DictReader((tmp_path / "out" / "merge_report.csv").read_text().splitlines())
    skew = 2 / 3**0.5  # of 8 0 0 0, and the opposite of 0 1 1 1
    hand = {"S_0": skew, "S_1": -skew, "K_0": 0.3 / (1 + skew), "K_1": 0.3 * (1 + skew), "k_0": 1, "k_1": 3}
    hand |= {"threshold_0": 8, "threshold_1": 1, "eta_0": 64 / 67, "eta_1": 3 / 67, "kept_energy": 1}
    hand |= {"changed": 1, "sign_conflicts": 0, "values": 4}
    assert {key: float(row[key]) for key in hand} == pytest.approx(hand, rel=1e-6)


def test_a_model_of_another_architecture_or_size_is_told_so_instead_of_a_list_of_tensors(tmp_path):
    settings = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2, "num_hidden_layers": 1}
    qwen = json.dumps(settings | {"architectures": ["Qwen2ForCausalLM"]})
    large = json.dumps(settings | {"hidden_size": 4, "num_hidden_layers": 8})
    pivot = folder_of(tmp_path / "p", {f"w{i}": torch.zeros(2) for i in range(9)}, config=json.dumps(settings))
    other = folder_of(tmp_path / "q", {f"v{i}": torch.zeros(3) for i in range(9)}, config=qwen)
    wide = folder_of(tmp_path / "l", {f"w{i}": torch.zeros(4) for i in range(9)}, config=large)
    with pytest.raises(UserError) as refused:
        merged(pivot, [other, wide], tmp_path / "out")
    told = [
        f"{other} is of another architecture (Qwen2ForCausalLM) than the pivot {pivot} (LlamaForCausalLM)",
        f"{wide} is of another size than the pivot {pivot}: hidden_size 4 against 2, num_hidden_layers 8 against 1",
    ]
    lines = str(refused.value).splitlines()[1:]
    assert lines == [f"  {line}: merge models that were trained from the pivot" for line in told]
