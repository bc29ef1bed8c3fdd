"""Conversations: user and assistant in turn. Checking their order, cutting long ones, finding them in a rendering."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]  # role and content
Render = Callable[[Sequence[Message]], str]
Span = tuple[int, int]
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def chat(turns: list[tuple[Any, Any]]) -> Row | None:
    """Messages from ``(role, content)`` pairs: an optional system turn, then user and assistant in turn.

    The assistant is last: a trailing user turn is cut, as nothing answers it. None for other orders, unknown roles and
    empty or non-text content.
    """
    named = [(ROLES.get(str(role)), content) for role, content in turns]
    if named and named[-1][0] == "user":
        named.pop()
    body = named[1:] if named and named[0][0] == "system" else named
    expected = ["user", "assistant"] * (len(body) // 2)
    if not body or [role for role, _ in body] != expected:
        return None
    if any(not isinstance(content, str) or not content.strip() for _, content in named):
        return None
    return {"messages": [{"role": role, "content": content} for role, content in named]}


def split_between_turns(sample: Row, max_characters: int | None) -> list[Row]:
    """Cut a conversation of more than ``max_characters`` between turns; every part keeps the system turn.

    A single exchange that is longer stays whole. None, or a sample of raw text: nothing is cut.
    """
    if max_characters is None or "messages" not in sample:
        return [sample]
    system = [m for m in sample["messages"] if m["role"] == "system"]
    turns = [m for m in sample["messages"] if m["role"] != "system"]
    parts: list[list[Row]] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        size = sum(len(m["content"]) for m in parts[-1]) if parts else max_characters
        if not parts or size + len(question["content"]) + len(answer["content"]) > max_characters:
            parts.append([])
        parts[-1] += [question, answer]
    return [{"messages": [*system, *part]} for part in parts]


# ------------------------------------------------------------------------------ where a template prints what was said


@dataclass(frozen=True)
class Closing:
    """What ends an answer: the closing token, behind white space if the template prints some. ``ids`` end with it."""

    space: str
    token: str
    ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """As it is printed behind an answer."""
        return self.space + self.token


@dataclass(frozen=True)
class Turn:
    """An answer in a conversation's text, and what stands before it since the closing of the one before.

    ``is_closed``: whether the template printed the closing; else it was added. ``quoted``: the parts ``[start, end)``
    of the prompt in which someone wrote out a control token.
    """

    prompt: str
    response: str
    closing: Closing | None
    is_closed: bool
    quoted: Sequence[Span]


class TurnsError(Exception):
    """A conversation that cannot be trained on with this template; ``str()`` is the reason, by which it is counted."""


def find_contents(text: str, messages: Sequence[Message], indices: Sequence[int], render: Render) -> list[Span] | None:
    """Where the contents of the messages ``indices`` stand, ``[start, end)``, in ``text`` = ``render(messages)``.

    White space at the edges of a content may be missing. None where a content is printed otherwise, or not once.

    A content may look like another one, or like the template, so it is not searched for: the template is rendered again
    with words in place of the contents, which shows what it prints around them, and that must be what stands around the
    contents in ``text``.
    """
    frames = frames_of(messages, indices, render)
    contents = [messages[i]["content"] for i in indices]
    spans = None if frames is None else _between(text, frames, contents)
    return spans or _one_by_one(text, messages, indices, render)


def frames_of(messages: Sequence[Message], indices: Sequence[int], render: Render) -> list[str] | None:
    """What the template prints before, between and behind the contents of some messages.

    Found with words in place of the contents. None where it does not print each of these words once, in their order.
    """
    words = [unused_word(messages, number) for number in range(len(indices))]
    replaced = [dict(message) for message in messages]
    for i, word in zip(indices, words, strict=True):
        replaced[i]["content"] = word
    rest = render(replaced)
    frames = []
    for word in words:
        if rest.count(word) != 1:
            return None
        frame, _, rest = rest.partition(word)
        frames.append(frame)
    return [*frames, rest]


def unused_word(messages: Sequence[Message], number: int = 0) -> str:
    """A word that nobody says in this conversation; another one for each ``number``."""
    salt = 0
    while any(f"xq{salt}y" in message["content"] for message in messages):
        salt += 1
    return f"xq{salt}y{number}z"


def _between(text: str, frames: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """The contents' spans in a text that is the frames with the contents between them."""
    spans = []
    position = len(frames[0])
    if not text.startswith(frames[0]):
        return None
    for content, frame in zip(contents, frames[1:], strict=True):
        end = _printed_until(text, position, content, frame)
        if end is None:
            return None
        spans.append((position, end))
        position = end + len(frame)
    return spans if position == len(text) else None


def _printed_until(text: str, start: int, content: str, frame: str) -> int | None:
    """Where ``content``, printed from ``start`` on, ends and ``frame`` follows; its edges may lack white space."""
    before, body, behind = split_edges(content)
    place = text.find(body, start, start + len(before) + len(body))
    if place < 0 or not before.endswith(text[start:place]):
        return None
    end = place + len(body)
    for kept in range(len(behind), -1, -1):
        if text.startswith(behind[:kept] + frame, end):
            return end + kept
    return None


def split_edges(content: str) -> tuple[str, str, str]:
    """The white space at the beginning of a text, the text without it, and that at its end."""
    body = content.strip()
    start = len(content) - len(content.lstrip()) if body else 0
    return content[:start], body, content[start + len(body) :]


def _one_by_one(text: str, messages: Sequence[Message], indices: Sequence[int], render: Render) -> list[Span] | None:
    """The spans where a template prints other things around one content than around another, as Qwen 3's does.

    Of each content alone it is found what the template prints behind it, and the content must stand before that.
    """
    spans: list[Span] = []
    for i in indices:
        frames = frames_of(messages, [i], render)
        if frames is None or not text.endswith(frames[1]):
            return None
        end = len(text) - len(frames[1])
        _, body, behind = split_edges(messages[i]["content"])
        kept = next((n for n in range(len(behind), -1, -1) if text.endswith(body + behind[:n], 0, end)), None)
        if kept is None:
            return None
        start = end - kept - len(body)
        if spans and start < spans[-1][1]:
            return None
        spans.append((start, end))
    return spans
