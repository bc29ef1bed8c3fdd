import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmfusion.errors import UserError
from llmfusion.io.jsonl import write_jsonl
from llmfusion.models.loading import load_model, load_tokenizer
from llmfusion.models.scratch import make_model
from llmfusion.models.staging import stage_folder, stage_gguf, stage_hub
from llmfusion.study.schema.base_models import Architecture, GgufModel, HubModel, PathModel
from tests.unit.stand_ins import artifact

LICENSED = {"license": "mit", "vocabulary": "v"}


def take_folder(tmp_path, source):
    """The folder that ``source`` was staged into, and its facts."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder, stage_folder(PathModel(kind="path", path=str(source), **LICENSED), folder, None)


def convert_gguf(tmp_path, file):
    """The same of a GGUF file."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder, stage_gguf(GgufModel(kind="gguf", path=str(file), **LICENSED), folder, None)


@pytest.fixture
def source(tmp_path, pivot):
    return shutil.copytree(pivot.folder, tmp_path / "source")


def test_a_folder_is_taken_over_without_code_and_pickles(tmp_path, source, pivot):
    for name in ("modeling_own.py", "pytorch_model.bin", "notes.md"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("mine")
    folder, facts = take_folder(tmp_path, source)
    assert {p.name for p in folder.iterdir()} == {p.name for p in pivot.folder.iterdir()} | {"LICENSE"}
    assert (folder / "model.safetensors").read_bytes() == (pivot.folder / "model.safetensors").read_bytes()
    assert facts == {**pivot.facts, "license": "mit"}


def small_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pickled weights are refused: pytorch_model.bin",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors weights"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (shutil.rmtree, "is no folder"),
        (small_vocabulary, "the tokenizer has 300 tokens, the model only 200 rows"),
    ],
)
def test_an_unusable_folder_is_refused_with_the_reason(tmp_path, source, spoil, message):
    spoil(source)
    with pytest.raises(UserError, match=message):
        take_folder(tmp_path, source)


def test_the_hub_out_of_reach_is_told_with_the_way_out(tmp_path):
    base = HubModel(kind="hub", repo="owner/model", revision="0123456789abcdef" * 2 + "01234567", **LICENSED)
    message = r"owner/model at 0123456789ab: could not be downloaded: .*use kind: path"
    with pytest.raises(UserError, match=message):
        stage_hub(base, tmp_path, None)


def write_gguf(file, model, tokenizer):
    """A Qwen2 checkpoint as llama.cpp's converter would write it, unquantised."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in body["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in state.items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def qwen_tokenizer(tokenizer):
    """The tokenizer with the end token under the name every Qwen2 has."""
    from transformers import PreTrainedTokenizerFast

    core = type(tokenizer.backend_tokenizer).from_str(
        tokenizer.backend_tokenizer.to_str().replace("<|end|>", "<|endoftext|>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|pad|>")


def test_a_gguf_file_becomes_a_checkpoint_with_the_same_tensors_and_tokens(tmp_path, qwen_tokenizer, capfd):
    tokenizer = qwen_tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = Architecture(
        model_type="qwen2", num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, **shape
    )
    model = make_model(architecture, tokenizer, 5)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    capfd.readouterr()
    folder, facts = convert_gguf(tmp_path, tmp_path / "tiny.gguf")
    assert "\r" not in capfd.readouterr().err  # no progress bars
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(artifact(folder), "float32")(ids).logits, model.eval()(ids).logits)
    again = load_tokenizer(folder, None)
    text = "User: apples and pens\n"  # Qwen2 splits numbers into digits, whatever the file says
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.eos_token, again.decode(again(text)["input_ids"])) == ("<|endoftext|>", text)
    assert facts["architecture"] == "Qwen2ForCausalLM"


def test_a_byte_level_gguf_file_without_gpt2s_end_token_keeps_its_number_of_tokens(tmp_path, pivot):
    own = load_tokenizer(pivot, None)
    assert "<|endoftext|>" not in own.get_vocab()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen2 = Architecture(model_type="qwen2", num_key_value_heads=1, max_position_embeddings=128, **shape)
    model = make_model(qwen2, own, 5)
    assert model.config.vocab_size == len(own)  # as Llama 3 has a row for each token, and no more
    write_gguf(tmp_path / "tiny.gguf", model, own)
    folder, facts = convert_gguf(tmp_path, tmp_path / "tiny.gguf")
    assert facts["tokenizer_size"] == len(own)
    assert load_tokenizer(folder, None).get_vocab() == own.get_vocab()


def test_what_is_wrong_with_a_converted_gguf_file_is_said_of_the_file(tmp_path, pivot):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen2 = Architecture(model_type="qwen2", num_key_value_heads=1, max_position_embeddings=128, **shape)
    own = load_tokenizer(pivot, None)
    own.chat_template = "{{ ''.__class__ }}"
    write_gguf(tmp_path / "tiny.gguf", make_model(qwen2, own, 5), own)
    with pytest.raises(UserError, match=r"tiny\.gguf: the chat template, line 1: it reads '__class__'"):
        convert_gguf(tmp_path, tmp_path / "tiny.gguf")


def test_another_file_is_no_gguf(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match=r"is no \.gguf file"):
        convert_gguf(tmp_path, tmp_path / "a.jsonl")
