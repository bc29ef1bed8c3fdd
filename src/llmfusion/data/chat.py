"""From a sample to token ids and labels, through a model's own chat template.

Each piece of text is tokenised alone and the ids are joined: a response gets the same ids behind any prompt, so
teachers and students that share a vocabulary share label positions (docs/methods.md). Labels are the responses and the
end token behind each; they are marked by position, so a pad token equal to the end token does no harm.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from llmfusion.data.samples import Sample

NEUTRAL = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}Assistant:\n{{ m['content'] }}{{ eos_token }}\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}{{ m['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
TEMPLATES = {"neutral": NEUTRAL}
Piece = tuple[str, bool]  # text, and whether it is a response


@dataclass(frozen=True)
class Encoded:
    """Token ids of a sample and, for each, whether it is a label: a token of a response or its end token."""

    ids: Sequence[int]
    is_label: Sequence[bool | int]

    def compact(self) -> "Encoded":
        """The same in 5 bytes a token instead of nearly 50, which counts where a whole mix is held in memory."""
        return Encoded(array("i", self.ids), bytes(self.is_label))

    @property
    def label_ids(self) -> list[int]:
        """Ids of the label tokens in order: row i of a teacher's cache predicts entry i."""
        return [token for token, label in zip(self.ids, self.is_label, strict=True) if label]

    def segments(self) -> tuple[list[int], list[int]]:
        """For each response: the number of its first label among all labels, and the token before that label."""
        starts: list[int] = []
        prompts: list[int] = []
        row = 0
        for position, label in enumerate(self.is_label):
            if label:
                if not self.is_label[position - 1]:
                    starts.append(row)
                    prompts.append(self.ids[position - 1])
                row += 1
        return starts, prompts


def prompt_text(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The text that asks for an answer to ``messages``."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def pieces(sample: Sample, tokenizer: Any) -> list[Piece] | str:
    """Split a sample into prompt and response pieces; every assistant turn is a response.

    Returns a reason instead where the template refuses the roles, or rewrites earlier turns, so that a prefix of the
    conversation is no prefix of its text.
    """
    if "text" in sample:
        return [(sample["text"], True)]
    messages = sample["messages"]
    rendered = ""  # the conversation's text up to here
    out: list[Piece] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = prompt_text(messages[:i], tokenizer)
        except TemplateError:  # "system role not supported", "roles must alternate"
            return "template refuses it"
        if not prompt.startswith(rendered):
            return "template rewrites history"
        between = prompt[len(rendered) :].removeprefix(tokenizer.eos_token if out else "")
        out += [(between, False), (message["content"], True)]
        rendered = prompt + message["content"]
    return out


def encode(sample: Sample, tokenizer: Any, max_length: int) -> Encoded | str:
    """Ids and labels of a sample, or why it cannot be used: ``too long``, ``no label``, ``template refuses it``, ..."""
    parts = pieces(sample, tokenizer)
    if isinstance(parts, str):
        return parts
    ids: list[int] = []
    is_label: list[bool] = []
    if "text" in sample and tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
        is_label.append(False)
    tokenized = tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"]
    for tokens, (_, is_response) in zip(tokenized, parts, strict=True):
        tokens = [*tokens, tokenizer.eos_token_id] if is_response else tokens
        ids += tokens
        is_label += [is_response] * len(tokens)
    if len(ids) > max_length:
        return "too long"
    if not any(is_label[1:]):
        return "no label"
    return Encoded(ids, [False, *is_label[1:]])  # the first token of all is predicted by nothing


@dataclass(frozen=True)
class TokenizedSample:
    """A sample of a batch, as it is and as the student reads it."""

    sample: Sample
    encoded: Encoded
