"""From a sample to token ids and labels, through a model's own chat template.

Each piece of text is tokenised alone and the ids are joined: a response gets the same ids behind any prompt, so teachers
and students that share a vocabulary share label positions (docs/methods.md). Labels are the responses and the end
token behind each; they are marked by position, so a pad token equal to the end token does no harm.
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
    """Token ids of a sample and, for each, whether it is a label (a response token or the end token behind a response)."""

    ids: Sequence[int]
    is_label: Sequence[bool | int]

    def compact(self) -> "Encoded":
        """The same in 5 bytes a token instead of nearly 50: of a whole mix that is much."""
        return Encoded(array("i", self.ids), bytes(self.is_label))

    @property
    def label_ids(self) -> list[int]:
        """Ids of the label tokens in order: row i of a teacher's cache predicts entry i."""
        return [token for token, label in zip(self.ids, self.is_label, strict=True) if label]

    def segments(self) -> tuple[list[int], list[int]]:
        """For each response: its first row among the label rows, and the token its first label follows."""
        starts, prompts, row = [], [], 0
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

    Returns a reason instead where the template refuses the roles, or rewrites earlier turns, so that a prefix of the conversation is no prefix
    of its text.
    """
    if "text" in sample:
        return [(sample["text"], True)]
    messages, done = sample["messages"], ""
    out: list[Piece] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            asked = prompt_text(messages[:i], tokenizer)
        except TemplateError:  # "system role not supported", "roles must alternate"
            return "template refuses it"
        if not asked.startswith(done):
            return "template rewrites history"
        between = asked[len(done) :].removeprefix(tokenizer.eos_token if out else "")
        out += [(between, False), (message["content"], True)]
        done = asked + message["content"]
    return out


def encode(sample: Sample, tokenizer: Any, max_length: int) -> Encoded | str:
    """Ids and labels of a sample, or why it cannot be used: ``too long``, ``no label``, ``template rewrites history``."""
    split = pieces(sample, tokenizer)
    if isinstance(split, str):
        return split
    ids: list[int] = []
    is_label: list[bool] = []
    if "text" in sample and tokenizer.bos_token_id is not None:
        ids, is_label = [tokenizer.bos_token_id], [False]
    for tokens, (_, response) in zip(
        tokenizer([t for t, _ in split], add_special_tokens=False)["input_ids"], split, strict=True
    ):
        tokens = [*tokens, tokenizer.eos_token_id] if response else tokens
        ids += tokens
        is_label += [response] * len(tokens)
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
