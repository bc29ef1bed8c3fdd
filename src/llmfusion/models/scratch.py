"""Miniature base models: a tokenizer trained on the mix, a randomly initialised architecture, and the common training loop."""

from pathlib import Path
from typing import Any

from llmfusion.data.chat import TEMPLATES
from llmfusion.data.samples import read_jsonl, text_of
from llmfusion.study.schema.base_models import Architecture, Tokenizer

END, PAD = "<|end|>", "<|pad|>"


def make_tokenizer(options: Tokenizer, samples: Path, chat_template: str | None) -> Any:
    """Byte-level BPE with an end and a pad token, trained on the texts of a mix; the order of samples decides ties."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    digits = f"\\p{{N}}{{1,{options.digits}}}"
    words = Regex(rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text_of(s) for s in read_jsonl(samples)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATES.get(chat_template or "neutral", chat_template)
    return tokenizer


def make_model(architecture: Architecture, tokenizer: Any, seed: int) -> Any:
    """A model with random weights of the given shape, in float32."""
    import torch
    import transformers

    shape = architecture.model_dump(exclude={"model_type"}, exclude_none=True)
    names = {"llama": "Llama", "qwen2": "Qwen2", "gpt_neox": "GPTNeoX"}
    family = names[architecture.model_type]
    config = getattr(transformers, f"{family}Config")(
        **shape,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config)
