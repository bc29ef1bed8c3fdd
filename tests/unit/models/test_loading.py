import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from llmfusion.data.chat import TEMPLATES
from llmfusion.errors import DamagedError, UserError
from llmfusion.models.loading import (
    empty_model,
    end_tokens,
    load_model,
    load_tokenizer,
    meta_copy,
    model_facts,
    save_model,
    vocabulary_sha256,
)
from tests.unit.stand_ins import artifact

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, pivot):
    return shutil.copytree(pivot.folder, tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_a_saved_model_loads_with_equal_tensors_in_eval_mode(pivot, tokenizer):
    stored = load_file(pivot.folder / "model.safetensors")
    model = load_model(pivot, "float32")
    assert not model.training
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert load_model(pivot, "bfloat16").lm_head.weight.equal(stored["lm_head.weight"].bfloat16())
    again = load_tokenizer(pivot, None)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("12 apples\n")["input_ids"] == tokenizer("12 apples\n")["input_ids"]


def test_tied_weights_are_not_missing(tied_teacher):
    model = load_model(tied_teacher, "float32")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(tied_teacher.folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop(WEIGHT), DamagedError),
        (lambda t: t.update(extra=torch.zeros(2)), DamagedError),
        (lambda t: t.update({WEIGHT: torch.zeros(3, 16)}), DamagedError),
        (lambda t: t[WEIGHT][0, 0].fill_(torch.nan), UserError),
        (lambda t: t[WEIGHT][3, 1].fill_(-torch.inf), UserError),
    ],
    ids=["missing", "extra", "other shape", "NaN", "infinite"],
)
def test_a_checkpoint_with_a_wrong_tensor_is_refused_by_its_name(folder, change, error):
    rewrite(folder, change)
    with pytest.raises(error, match=r"extra|model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(artifact(folder), "float32")


def test_an_architecture_that_needs_code_from_its_repository_is_refused(folder):
    configure(
        folder, architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    )
    with pytest.raises(
        UserError, match=r"has no class 'OwnForCausalLM'; code from its repository \(auto_map\) is never run"
    ):
        load_model(artifact(folder), "float32")


def test_code_in_a_checkpoint_is_never_run_where_transformers_has_the_class(folder, tmp_path, pivot):
    names = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
        "AutoTokenizer": ["own.OwnTokenizer", None],
    }
    configure(folder, auto_map=names)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    model = load_model(artifact(folder), "float32")
    load_tokenizer(folder, None)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_never_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(artifact(folder), "float32")


def test_a_model_that_is_not_finite_is_not_saved(tmp_path, pivot, tokenizer):
    model = load_model(pivot, "float32")
    model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is not finite"):
        save_model(model, tokenizer, tmp_path, "float32")
    assert not list(tmp_path.iterdir())


def test_the_facts_of_a_model_are_those_of_its_files(pivot, tokenizer):
    facts = model_facts(pivot.folder, tokenizer)
    total = sum(t.numel() for t in load_file(pivot.folder / "model.safetensors").values())
    assert facts["parameters"] == total
    assert (facts["architecture"], facts["hidden_size"], facts["vocabulary_size"], facts["eos_token"]) == (
        "LlamaForCausalLM",
        16,
        300,
        "<|end|>",
    )


@pytest.mark.parametrize(
    ("own", "asked", "used"),
    [
        (None, None, TEMPLATES["neutral"]),
        (None, "neutral", TEMPLATES["neutral"]),
        (None, "{{ 1 }}", "{{ 1 }}"),
        ("{{ 2 }}", "{{ 1 }}", "{{ 2 }}"),
    ],
)
def test_a_tokenizer_without_a_chat_template_gets_the_studys(tmp_path, tokenizer, own, asked, used):
    other = copy.deepcopy(tokenizer)
    other.chat_template = own
    other.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, asked).chat_template == used


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ broken", "the chat template, line 1: unexpected end of template"),
        ("\n{% for m in messages %}{{ 'a' * 10**10 }}{% endfor %}", "the chat template, line 2: it does more work"),
        ("{{ messages[0].__class__ }}", "the chat template, line 1: it reads '__class__'"),
        ("{% include '/etc/passwd' %}", "the chat template, line 1: the tag 'include' is not allowed"),
    ],
)
def test_a_chat_template_that_is_no_jinja_or_not_safe_is_refused_with_its_folder_and_line(
    tmp_path, tokenizer, template, error
):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=error) as raised:
        load_tokenizer(tmp_path, None)
    assert str(raised.value).startswith(str(tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused_and_one_without_a_pad_token_pads_with_it(tmp_path, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    other.save_pretrained(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a", None).pad_token == "<|end|>"
    other.eos_token = None
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(tmp_path / "b", None)


def changed(tokenizer, change):
    from tokenizers import Tokenizer

    other = copy.deepcopy(tokenizer)
    body = json.loads(other.backend_tokenizer.to_str())
    change(body)
    other._tokenizer = Tokenizer.from_str(json.dumps(body))
    return vocabulary_sha256(other)


def test_added_tokens_and_templates_do_not_change_a_vocabulary(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|more|>"])
    other.add_special_tokens({"bos_token": "<|begin|>"})
    other.chat_template = "{{ 1 }}"
    assert vocabulary_sha256(other) == vocabulary_sha256(tokenizer)
    renamed = copy.deepcopy(tokenizer)  # an end token of another name, which the base vocabulary holds, too
    renamed._tokenizer = type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str().replace("<|end|>", "<|stop|>")
    )
    assert "<|stop|>" in renamed.get_vocab()
    assert vocabulary_sha256(renamed) == vocabulary_sha256(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["model"]["merges"].pop(),
        lambda body: body["model"]["vocab"].update(zebra=300),
        lambda body: body.update(normalizer={"type": "Lowercase"}),
        lambda body: body["pre_tokenizer"]["pretokenizers"].pop(0),
    ],
    ids=["merges", "vocabulary", "normaliser", "pre-tokenizer"],
)
def test_what_changes_token_ids_changes_a_vocabulary(tokenizer, change):
    assert changed(tokenizer, lambda body: None) == vocabulary_sha256(tokenizer)
    assert changed(tokenizer, change) != vocabulary_sha256(tokenizer)


@pytest.mark.parametrize(("more", "expected"), [(None, []), (0, []), (3, [3]), ([9, 0], [9])])
def test_an_answer_ends_with_the_tokenizers_end_token_the_models_and_the_templates(tokenizer, more, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=more))
    assert tokenizer.eos_token_id == 0
    assert end_tokens(model, tokenizer) == sorted({0, *expected})
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<|stop|>{% endfor %}"
    assert end_tokens(model, other) == sorted({0, *expected, other.convert_tokens_to_ids("<|stop|>")})


def test_a_tokenizer_is_read_as_it_is_whatever_class_its_settings_name(tmp_path, tokenizer):
    """The class named may rebuild it: a byte-level tokenizer declared as LlamaTokenizerFast would lose its spaces."""
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    found = load_tokenizer(tmp_path, None)
    text = "def f(x):\n    return x + 1"
    assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text
    assert vocabulary_sha256(found) == vocabulary_sha256(tokenizer)


def test_a_second_copy_of_the_weights_beside_the_index_is_not_counted_and_not_merged(tmp_path, pivot):
    from llmfusion.io.safetensors import read_checkpoint_headers, weight_files

    folder = tmp_path / "p"
    shutil.copytree(pivot.folder, folder)
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert [p.name for p in weight_files(folder)] == ["model.safetensors"]
    assert read_checkpoint_headers(folder).keys() == read_checkpoint_headers(pivot.folder).keys()


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_model_has_the_shape_and_the_ties_but_no_weights(pivot, tied_teacher, tied):
    made = tied_teacher if tied else pivot
    full = load_model(made, "float32")
    for empty in (empty_model(made), meta_copy(full)):
        assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
        assert not empty.training
        for name, buffer in full.named_buffers():
            assert torch.equal(empty.get_buffer(name), buffer)
    assert meta_copy(full.train()).training
    assert meta_copy(full).generation_config is full.generation_config


def test_settings_about_loading_and_computing_are_not_the_models(folder, tmp_path):
    """A config may name a kernel to download and run, another file of weights, code: none of it is looked at."""
    changes = {
        "_attn_implementation": "owner/kernel",
        "attn_implementation": "owner/kernel",
        "transformers_weights": "../other.safetensors",
        "auto_map": {"AutoConfig": "own.Own"},
        "to_dict": 1,
    }
    configure(folder, **changes)
    for made in (load_model(artifact(folder), "float32"), empty_model(artifact(folder))):
        assert made.config._attn_implementation in ("sdpa", "eager")
        assert not set(changes) - {"_attn_implementation", "to_dict"} & set(made.config.to_dict())
        assert made.config.name_or_path == str(folder)
    load_model(artifact(folder), "float32").save_pretrained(tmp_path / "saved")
    assert "owner/kernel" not in (tmp_path / "saved" / "config.json").read_text()


def test_transformers_sees_the_checked_files_alone(folder):
    from llmfusion.models.folder import ModelFolder, loadable_files, private_folder, tokenizer_files

    for name in ("adapter_config.json", "pytorch_model.bin", "own.py", "config.1.0.json", "processor_config.json"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    model = ModelFolder.of(artifact(folder))
    with private_folder(loadable_files(model, LlamaConfig)) as private:
        assert {p.name for p in private.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
        assert [p.name for p in private.iterdir() if p.is_symlink()] == ["model.safetensors"]
    with private_folder(tokenizer_files(model)) as private:
        assert {p.name for p in private.iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }


def test_a_file_that_no_manifest_lists_is_not_read(folder):
    listed = artifact(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|pad|>"}')
    with pytest.raises(DamagedError, match=r"special_tokens_map\.json: is not in .*manifest\.json"):
        load_tokenizer(listed, None)


def test_what_is_saved_of_a_loaded_model_names_no_folder_of_ours(folder, tmp_path):
    (folder / "tokenizer.model").write_bytes(b"x")  # transformers keeps the path of such a file
    for place in ("a", "b"):
        made = artifact(folder)
        tokenizer = load_tokenizer(made, None)
        assert tokenizer.vocab_file == str(folder / "tokenizer.model")
        save_model(load_model(made, "float32"), tokenizer, tmp_path / place, "float32")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert b"llmfusion-" not in (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), OverflowError("x"), BaseException("a panic")])
def test_whatever_a_library_raises_becomes_a_sentence(tmp_path, error):
    from llmfusion.models.folder import explain_failure

    with pytest.raises(UserError, match=f"^{tmp_path}: .*model"), explain_failure(tmp_path, "model"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_a_wish_to_stop_and_a_full_disk_stay_as_they_are(tmp_path, error):
    from llmfusion.models.folder import explain_failure

    with pytest.raises(type(error)), explain_failure(tmp_path, "model"):
        raise error
