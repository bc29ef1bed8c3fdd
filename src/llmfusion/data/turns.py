"""Conversations: user and assistant in turn. Checking their order, and cutting long ones."""

from typing import Any

Row = dict[str, Any]
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
