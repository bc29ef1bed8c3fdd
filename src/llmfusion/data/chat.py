"""From a sample to token ids and labels, through a model's own chat template.

A conversation is rendered once, and each answer is looked up in that text (:mod:`llmfusion.data.turns`): what the
template prints is what is trained. Each piece of text is tokenised alone and the ids are joined: a response gets the
same ids behind any prompt, so teachers and students that share a vocabulary share label positions (docs/methods.md).
Labels are the responses and the closing token behind each, which is the template's own; they are marked by position,
so a pad token equal to the end token does no harm.
"""

import re
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from llmfusion.data.samples import Sample
from llmfusion.data.turns import Closing, Message, Span, Turn, TurnsError, find_contents, frames_of, unused_word
from llmfusion.errors import UserError
from llmfusion.io.templates import RefusedByTemplate, Template, TemplateError, UnsafeTemplate, compiled

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
PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a sample and, for each, whether it is a label: of a response, or of what closes it."""

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


@dataclass(frozen=True)
class TokenizedSample:
    """A sample of a batch, as it is and as the student reads it."""

    sample: Sample
    encoded: Encoded


class ChatFormat:
    """A tokenizer with its chat template: how a conversation is written, and what closes an answer.

    ``closings``: what the template prints behind the last answer of a conversation, then what it prints behind earlier
    ones where that differs; the end token where it prints nothing. Raises
    :class:`~llmfusion.io.templates.TemplateError` for a template that cannot be compiled.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = weakref.ref(tokenizer)
        self.source = tokenizer.chat_template
        self.variables = dict(tokenizer.special_tokens_map)
        self.template = _template_of(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} | {tokenizer.eos_token}
        self._added = {token.content for token in added if token.content.strip()} | {tokenizer.eos_token}
        begin = {self.variables.get("bos_token")} - {tokenizer.eos_token}  # may stand behind an answer, but closes none
        self._may_close = self._added - begin
        self._lengths = sorted({len(token) for token in self._may_close}, reverse=True)
        self._known_closings: dict[tuple[str, str], Closing] = {}
        self._prepends_space = _prepends_space(tokenizer)
        self.frames = self._probe()
        found = [self._closing_in(frame) for frame in reversed(self.frames[1:])]
        self.closings = tuple(dict.fromkeys(closing for closing in found if closing)) or (self.end,)
        printed = "".join(self.frames)
        self._special_token = _any_of(self._special)
        self._control_token = _any_of(self._special | {token for token in self._added if token in printed})

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which must still be in use."""
        return self._tokenizer()

    @property
    def end(self) -> Closing:
        """The tokenizer's end token, which closes a text and the answers of templates that print nothing there."""
        return self._closing("", self.tokenizer.eos_token)

    def _probe(self) -> list[str]:
        """What the template prints around the answers of a conversation, or of a shorter one if it refuses that."""
        for messages in (PROBE, PROBE[:2]):
            try:
                frames = frames_of(messages, range(1, len(messages), 2), self.render)
            except UnsafeTemplate:
                raise
            except TemplateError:
                continue
            if frames is not None:
                return frames
        return []

    def _closing_in(self, text: str) -> Closing | None:
        """The closing that ``text``, printed behind an answer, begins with: white space and an added token."""
        space = text[: len(text) - len(text.lstrip())]
        for length in self._lengths:
            token = text[len(space) : len(space) + length]
            if token in self._may_close:
                return self._closing(space, token)
        return None

    def _closing(self, space: str, token: str) -> Closing:
        if (space, token) not in self._known_closings:
            ids = [self.tokenizer.convert_tokens_to_ids(token)]
            if space:  # as it is tokenised behind an answer
                ids = self._ids(f"b{space}{token}")[len(self._ids("b")) :]
            self._known_closings[space, token] = Closing(space, token, tuple(ids))
        return self._known_closings[space, token]

    # ---- text

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, as ``apply_chat_template`` gives it (:mod:`llmfusion.io.templates`)."""
        return self.template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """The conversation's answers as the template prints them, each with what stands before it and what closes it.

        Raises :class:`TurnsError` with the reason where the template refuses the conversation, fails on it, or prints
        an answer otherwise than with other white space at its edges.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, spans = self._find(messages, answers)
        quoted = self._quoted(messages)
        ends = [start for start, _ in spans[1:]] + [len(text)]
        turns = []
        position = 0
        for (start, end), following in zip(spans, ends, strict=True):
            printed = self._closing_in(text[end:following])
            prompt = text[position:start]
            if self._prepends_space and prompt.endswith(" "):  # the response's first token writes it
                prompt = prompt[:-1]
            inside = [(a - position, b - position) for a, b in quoted if position <= a and b <= start]
            turns.append(Turn(prompt, text[start:end], printed or self.closings[0], printed is not None, inside))
            position = end + (len(printed.text) if printed else 0)
        return turns

    def _find(self, messages: Sequence[Message], indices: Sequence[int]) -> tuple[str, list[Span]]:
        """The conversation's text, and where the contents of the messages ``indices`` stand in it."""
        try:
            text = self.render(messages)
            spans = find_contents(text, messages, indices, self.render)
        except RefusedByTemplate:
            raise TurnsError("template refuses it") from None
        except UnsafeTemplate:
            raise
        except TemplateError as error:
            raise TurnsError(f"template fails: {error.summary}") from None
        if spans is None:
            raise TurnsError("template changes an answer")
        return text, spans

    def has_quoted(self, messages: Sequence[Message]) -> bool:
        """Whether somebody wrote out a control token."""
        return any(self._control_token.search(message["content"]) for message in messages)

    def _quoted(self, messages: Sequence[Message]) -> list[Span]:
        """Where a user or the system turn wrote out a control token, which must not become one."""
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" or not self._control_token.search(message["content"]):
                continue
            word = unused_word(messages)
            replaced = [*messages[:i], {**message, "content": word}, *messages[i + 1 :]]
            if word not in self.render(replaced):  # the template leaves this turn out
                continue
            try:
                text, [(start, end)] = self._find(messages, [i])
            except TurnsError:
                raise TurnsError("contains a special token") from None
            spans += [match.span() for match in self._control_token.finditer(text, start, end)]
        return sorted(spans)

    def prompt(self, messages: Sequence[Message]) -> list[Turn]:
        """A conversation that ends with a question, as turns; the last one's response is empty.

        It ends as the template prints it before an answer: a model is asked with the very text that it was trained
        with. A template that prints no answer there is asked with its own ``add_generation_prompt``. Raises
        :class:`TurnsError`.
        """
        word = unused_word(messages)
        try:
            *turns, last = self.turns([*messages, {"role": "assistant", "content": word}])
            return [*turns, Turn(last.prompt, "", None, False, last.quoted)]
        except TurnsError as error:
            try:
                text = self.render(messages, add_generation_prompt=True)
            except TemplateError:
                raise error from None
        return [Turn(text, "", None, False, [])]

    # ---- token ids

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response, tokenised alone; special tokens that it writes out are ordinary text."""
        return self._ids(text, split_special_tokens=True) if self._special_token.search(text) else self._ids(text)

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Token ids and labels of turns.

        Each piece is tokenised alone. A prompt is tokenised behind the closing token in front of it, as in the whole
        text: some tokens take the white space behind them, and some tokenizers add a space to the very first word only.
        """
        anchors = ["", *(turn.closing.token if turn.closing else "" for turn in turns[:-1])]
        pairs = [(anchor + turn.prompt, turn.response) for anchor, turn in zip(anchors, turns, strict=True)]
        tokenized = self.tokenizer([text for pair in pairs for text in pair], add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        is_label: list[bool] = []
        for i, (anchor, turn) in enumerate(zip(anchors, turns, strict=True)):
            prompt = self._quoting_ids(turn) if turn.quoted else self._behind(anchor, turn.prompt, tokenized[2 * i])
            is_plain = not self._special_token.search(turn.response)
            response = tokenized[2 * i + 1] if is_plain else self.response_ids(turn.response)
            labels = [*response, *(turn.closing.ids if turn.closing else ())]
            ids += [*prompt, *labels]
            is_label += [False] * len(prompt) + [True] * len(labels)
        return ids, is_label

    def _behind(self, anchor: str, text: str, tokenized: list[int]) -> list[int]:
        """Ids of ``text`` from those of ``anchor + text``."""
        if not anchor:
            return tokenized
        is_one_token = tokenized[:1] == [self.tokenizer.convert_tokens_to_ids(anchor)]
        return tokenized[1:] if is_one_token else self._ids(text)

    def _quoting_ids(self, turn: Turn) -> list[int]:
        """Ids of a prompt in which control tokens are written out: there they are ordinary text."""
        ids: list[int] = []
        position = 0
        for start, end in turn.quoted:
            token = turn.prompt[start:end]
            ids += self._ids(turn.prompt[position:start])
            ids += self.response_ids(token) if token in self._special else self._ids(token[:1]) + self._ids(token[1:])
            position = end
        return ids + self._ids(turn.prompt[position:])


def _template_of(tokenizer: Any) -> Template:
    """The compiled template; of several the one named ``default``."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{tokenizer.name_or_path}: has chat templates {list(tokenizer.chat_template)}, none is called 'default'"
        )
    return compiled(source, f"{tokenizer.name_or_path or 'tokenizer'}: the chat template", "chat")


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Finds one of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _prepends_space(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a space before a text that has none, as SentencePiece does."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"][:1])
    return bool(first) and first[0].startswith(("▁", "Ġ"))


_formats: WeakKeyDictionary[Any, ChatFormat] = WeakKeyDictionary()


def chat_format(tokenizer: Any) -> ChatFormat:
    """The tokenizer's :class:`ChatFormat`, made once, and again where its template or special tokens were changed."""
    known = _formats.get(tokenizer)
    if known is None or known.source != tokenizer.chat_template or known.variables != tokenizer.special_tokens_map:
        known = _formats[tokenizer] = ChatFormat(tokenizer)
    return known


def prompt_text(messages: list[Message], tokenizer: Any) -> str:
    """The text that asks for an answer to ``messages``. Raises :class:`UserError` where the template refuses them."""
    try:
        turns = chat_format(tokenizer).prompt(messages)
    except TurnsError as error:
        raise UserError(f"{tokenizer.name_or_path}: the chat template cannot ask this question: {error}") from None
    return "".join(turn.prompt + turn.response + (turn.closing.text if turn.closing else "") for turn in turns)


def prompt_ids(messages: list[Message], tokenizer: Any) -> list[int] | str:
    """Token ids that ask for an answer to ``messages``, the same as before that answer in training; or why not."""
    chat = chat_format(tokenizer)
    try:
        return chat.encode(chat.prompt(messages))[0]
    except TurnsError as error:
        return str(error)


def closing_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens with which the template closes an answer; generating stops at them."""
    return sorted({closing.ids[-1] for closing in chat_format(tokenizer).closings})


def closings(tokenizer: Any) -> list[tuple[int, ...]]:
    """Ids that may close a response, the longest first: those of the template, and the end token."""
    chat = chat_format(tokenizer)
    return sorted({closing.ids for closing in (*chat.closings, chat.end)}, key=len, reverse=True)


def turn_headers(tokenizer: Any) -> list[str]:
    """How the template begins a user's and an assistant's turn behind a closed answer, without edges of white space.

    A model that goes on behind its answer writes these (``\\nUser:`` with the neutral template): the answer ends there.
    """
    chat = chat_format(tokenizer)
    if len(chat.frames) < 3:
        return []
    closing = chat._closing_in(chat.frames[1])
    between = chat.frames[1].removeprefix(closing.text if closing else "")
    user, _, assistant = between.partition(PROBE[2]["content"])
    return [header.rstrip() for header in (user, assistant) if header.strip()]


def encode(sample: Sample, tokenizer: Any, max_length: int) -> Encoded | str:
    """Ids and labels of a sample, or why it cannot be used: ``too long``, ``no label``, ``template refuses it``, ..."""
    chat = chat_format(tokenizer)
    if "text" in sample:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        labels = [*chat.response_ids(sample["text"]), tokenizer.eos_token_id]
        ids = begin + labels
        is_label = [False] * len(begin) + [True] * len(labels)
    else:
        try:
            ids, is_label = chat.encode(chat.turns(sample["messages"]))
        except TurnsError as error:
            return str(error)
    if len(ids) > max_length:
        return "too long"
    if not any(is_label[1:]):
        return "no label"
    return Encoded(ids, [False, *is_label[1:]])  # the first token of all is predicted by nothing
