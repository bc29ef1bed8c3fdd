"""How the columns of a public dataset become samples or test items: one small function a layout.

A sample layout returns the messages of a row (or its text), an item layout the fields of a test item. Both raise
``KeyError`` for a column that is not there, which the caller turns into a message that lists the columns it saw.
``None`` means: nothing usable in this row (counted as ``malformed``).
"""

import random
import re
from collections.abc import Callable
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


def pair(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """Two columns: what the user says and what the model should answer."""
    return chat([("user", row[columns["prompt"]]), ("assistant", row[columns["response"]])])


def messages(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """A list of ``{"role", "content"}`` (no_robots)."""
    return chat([(m["role"], m["content"]) for m in row["messages"]])


def conversations(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """A list of ``{"from": human|gpt, "value"}`` (ShareGPT)."""
    return chat([(m["from"], m["value"]) for m in row["conversations"]])


def chatml(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """One string with ``<|im_start|>role ... <|im_end|>`` turns (oasst_top1)."""
    return chat(re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", row["text"], re.DOTALL))


def clusters(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """A cluster of similar samples under one instruction (orca-best): one of them, at random."""
    options = row["cluster"]["samples"]
    if not options:
        return None
    chosen = rng.choice(options)
    system = [("system", row["instruction"])] if row["instruction"] else []
    return chat([*system, ("user", chosen["input"]), ("assistant", chosen["output"])])


def text(row: Row, columns: dict[str, str], rng: random.Random) -> Row | None:
    """Raw text (MiniPile)."""
    return {"text": row["text"]} if isinstance(row["text"], str) and row["text"].strip() else None


def chat(turns: list[tuple[Any, Any]]) -> Row | None:
    """Messages from ``(role, content)`` pairs: an optional system turn, then user and assistant in turn, assistant last.

    A trailing user turn is cut (nothing answers it). None for other orders, unknown roles and empty or non-text content.
    """
    named = [(ROLES.get(str(role)), content) for role, content in turns]
    if named and named[-1][0] == "user":
        named.pop()
    body = named[1:] if named and named[0][0] == "system" else named
    expected = ["user", "assistant"] * (len(body) // 2)
    if (
        not body
        or [role for role, _ in body] != expected
        or any(not isinstance(c, str) or not c.strip() for _, c in named)
    ):
        return None
    return {"messages": [{"role": role, "content": content} for role, content in named]}


def split(sample: Row, limit: int | None) -> list[Row]:
    """Cut a conversation of more than ``limit`` characters between turns; every part keeps the system turn."""
    if limit is None or "messages" not in sample:
        return [sample]
    system = [m for m in sample["messages"] if m["role"] == "system"]
    turns = [m for m in sample["messages"] if m["role"] != "system"]
    parts: list[list[Row]] = []
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        size = sum(len(m["content"]) for m in parts[-1]) if parts else limit
        if not parts or size + len(asked["content"]) + len(answered["content"]) > limit:
            parts.append([])
        parts[-1] += [asked, answered]
    return [{"messages": [*system, *part]} for part in parts]


LAYOUTS: dict[str, Callable[[Row, dict[str, str], random.Random], Row | None]] = {
    "pair": pair, "messages": messages, "conversations": conversations, "chatml": chatml, "clusters": clusters, "text": text,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- test items
def mmlu(row: Row) -> Row:
    """Multiple choice: question, choices, the right index, subject."""
    return {
        "question": row["question"].strip(),
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "subject": row["subject"],
    }


def gsm8k(row: Row) -> Row:
    """Word problem; the number after ``####`` is the answer, what stands before it the worked solution."""
    solution, _, answer = row["answer"].rpartition("####")
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}


def math(row: Row) -> Row | None:
    """Competition problem; the answer is the last ``\\boxed{}`` of the solution."""
    from llmfusion.evaluation.grading import last_boxed

    answer = last_boxed(row["solution"])
    return (
        None
        if answer is None
        else {"question": row["problem"], "answer": answer, "solution": row["solution"], "subject": row["type"]}
    )


def humaneval(row: Row) -> Row:
    """Function to complete, with its test program."""
    return {key: row[key] for key in ("task_id", "prompt", "entry_point", "test")}


TASK_LAYOUTS: dict[str, Callable[[Row], Row | None]] = {
    "mmlu": mmlu,
    "gsm8k": gsm8k,
    "math": math,
    "humaneval": humaneval,
}
