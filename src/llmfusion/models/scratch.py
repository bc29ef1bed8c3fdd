"""Miniature base models: a tokenizer trained on a mix, and a randomly initialised architecture."""

from pathlib import Path
from typing import Any

from llmfusion.data.chat import TEMPLATES
from llmfusion.data.samples import read_samples, text_of
from llmfusion.study.schema.base_models import Architecture, Tokenizer

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "gpt_neox": "GPTNeoX"}  # transformers' classes by model type


def make_tokenizer(options: Tokenizer, samples: Path, chat_template: str | None) -> Any:
    """Byte-level BPE with an end and a pad token, trained on the texts of ``samples.jsonl``; ties go by their order."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_word_pattern(options.digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text_of(sample) for sample in read_samples(samples)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATES.get(chat_template or "neutral", chat_template)
    return tokenizer


def _word_pattern(digits: int) -> str:
    """What becomes a word before BPE, as in Llama 3 and Qwen 2: letters, a few digits, signs, line ends, spaces."""
    numbers = f"\\p{{N}}{{1,{digits}}}"
    return rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_model(architecture: Architecture, tokenizer: Any, seed: int) -> Any:
    """A model with random weights of the given shape, in float32."""
    import torch
    import transformers

    family = FAMILIES[architecture.model_type]
    config = getattr(transformers, f"{family}Config")(
        **architecture.model_dump(exclude={"model_type"}, exclude_none=True),
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config)
