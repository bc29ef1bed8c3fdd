"""The chat templates of real models (tests/data/chat_templates, with their sources), on small tokenizers made here."""

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmfusion.data.chat import NEUTRAL
from llmfusion.teachers.alignment import BYTE_OF_CHARACTER
from tests.project import ROOT

FOLDER = ROOT / "tests/data/chat_templates"
SOURCES: dict[str, dict[str, Any]] = json.loads((FOLDER / "sources.json").read_text("utf-8"))
NAMES = [*SOURCES, "neutral"]
THINKING = ["qwen3", "deepseek-r1-distill-llama"]  # leave out what stands before </think>
WITHOUT_SYSTEM = [  # refuse a system turn
    *("gemma-it", "gemma-2-it", "mistral-7b-instruct-v0.2"),
]
KEEP_NO_SYSTEM = ["phi-3-mini", "orion-14b-chat"]  # print none of it
NEUTRAL_MODEL = {"bos_token": "<s>", "eos_token": "</s>", "tokens": [], "closing": "</s>"}


def source(name: str) -> dict[str, Any]:
    """Tokens and closing of a model."""
    return NEUTRAL_MODEL if name == "neutral" else SOURCES[name]


def template(name: str) -> str:
    """The template's text, byte for byte."""
    return NEUTRAL if name == "neutral" else (FOLDER / f"{name}.jinja").read_bytes().decode()


def with_template(core: Tokenizer, name: str) -> Any:
    """A tokenizer of its own with the model's template and special tokens."""
    facts = source(name)
    special = dict.fromkeys([*filter(None, (facts["bos_token"], facts["eos_token"])), *facts["tokens"]])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=facts["bos_token"],
        eos_token=facts["eos_token"],
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = template(name)
    return out


@cache
def byte_level(name: str) -> Any:
    """Byte-level, as the tokenizers of Llama 3, Qwen, DeepSeek, Phi 4 and GPT-NeoX; a few merges."""
    alphabet = {character: i for i, character in enumerate(sorted(BYTE_OF_CHARACTER))}
    merges = [
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("Ċ", "Ċ"),
        ("Ġ", "Ġ"),
        ("<", "|"),
        ("Ġ", "a"),
        ("1", "2"),
        ("Ċ", "U"),
    ]
    vocabulary = alphabet | {a + b: len(alphabet) + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return with_template(core, name)


@cache
def sentencepiece(name: str) -> Any:
    """As the tokenizers of Llama 2 and Mistral: a space is put before each text, and byte fallback."""
    characters = "▁abcdefghiknorstwx:,.+=#1234AUISN[]/<>|\n"
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "▁a", "he", "▁U", "▁A", "an", "▁▁"]
    merges = [("▁", "a"), ("h", "e"), ("▁", "U"), ("▁", "A"), ("a", "n"), ("▁", "▁")]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_template(core, name)
