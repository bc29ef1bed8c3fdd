import re

import pytest
import torch

from llmfusion.models.loading import vocabulary_sha256
from llmfusion.models.scratch import make_model, make_tokenizer
from llmfusion.study.schema.base_models import Architecture, Tokenizer
from tests.unit.stand_ins import ARCHITECTURE

TRICKY = "Tom's 12345 apples:\r\n\n  x = 1e-5\t(é, 日本) ... "


@pytest.mark.parametrize("digits", [1, 3])
def test_a_tokenizer_gives_back_every_text_and_groups_digits(mix, digits):
    tokenizer = make_tokenizer(Tokenizer(vocabulary_size=320, digits=digits), mix.file("samples.jsonl"), None)
    assert tokenizer.decode(tokenizer(TRICKY, add_special_tokens=False)["input_ids"]) == TRICKY
    longest = max(len(run) for token in tokenizer.get_vocab() for run in re.findall(r"\d+", token))
    assert longest <= digits
    assert (longest > 1) == (digits > 1)
    assert len(tokenizer) == 320
    special = [tokenizer.eos_token, tokenizer.pad_token]
    assert tokenizer.convert_ids_to_tokens([0, 1]) == special == ["<|end|>", "<|pad|>"]


def test_the_same_texts_give_the_same_tokenizer_and_others_another(mix, tokenizer, tmp_path):
    again = make_tokenizer(Tokenizer(vocabulary_size=300), mix.file("samples.jsonl"), None)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    (tmp_path / "other.jsonl").write_text('{"id": "1", "text": "zebra zebra zebras zebu zebus"}\n')
    other = make_tokenizer(Tokenizer(vocabulary_size=262), tmp_path / "other.jsonl", None)
    assert vocabulary_sha256(other) != vocabulary_sha256(tokenizer)


@pytest.mark.parametrize(
    ("model_type", "shape", "architecture"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("gpt_neox", {"num_key_value_heads": None}, "GPTNeoXForCausalLM"),
    ],
)
def test_a_model_has_the_shape_asked_and_weights_by_its_seed(tokenizer, model_type, shape, architecture):
    options = Architecture(**{**ARCHITECTURE, "model_type": model_type, **shape})
    models = [make_model(options, tokenizer, seed) for seed in (1, 1, 2)]
    one, same, other = (m.get_output_embeddings().weight for m in models)
    assert type(models[0]).__name__ == architecture
    assert one.shape == (300, 16)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert models[0].get_input_embeddings().weight.data_ptr() != one.data_ptr()
    assert abs(float(one.std()) - 0.3) < 0.02
