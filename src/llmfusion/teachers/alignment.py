"""Which teacher rows and which student rows predict the same text.

Two models write the same response in different tokens. Each token covers a span of the response's UTF-8 bytes, and the
closing token behind a response, whichever it is, covers one byte more, which no text has. Rows whose labels cover the
same span predict the same thing after the same words (exact token alignment, DSKDv2). Bytes and not characters:
byte-level tokens split characters.

A span is ``[start, end)``; the spans of a sample are an int64 tensor (rows, 2), its responses laid end to end.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmfusion.data.samples import Sample
from llmfusion.data.turns import split_edges
from llmfusion.errors import UserError

SPACE = "▁"  # SentencePiece's
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's fallback for a byte


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token id writes; ids without a token write none.

    Reads byte-level vocabularies (GPT-2, Llama 3, Qwen, GPT-NeoX, DeepSeek) and SentencePiece's, with or without byte
    fallback. Raises :class:`UserError` for others, whose tokens do not say what text they stand for.
    """
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    own = [token for token in vocabulary if token not in added]
    if all(BYTE_OF_CHARACTER.keys() >= set(token) for token in own):
        decode = _byte_level
    elif any(token.startswith(SPACE) for token in own):
        decode = _sentencepiece
    else:
        raise UserError(
            f"a {type(tokenizer).__name__} of {len(vocabulary)} tokens is neither byte-level nor SentencePiece: "
            "its tokens cannot be aligned by text"
        )
    bytes_by_id = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        bytes_by_id[i] = token.encode() if token in added else decode(token)
    return bytes_by_id


def _byte_level_alphabet() -> dict[str, int]:
    """Byte of each character of the byte-level alphabet: printable Latin-1 is itself, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def _sentencepiece(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def responses(sample: Sample) -> list[str]:
    """The texts whose tokens are labels: every assistant turn, or the raw text."""
    if "text" in sample:
        return [sample["text"]]
    return [message["content"] for message in sample["messages"] if message["role"] == "assistant"]


def token_spans(vocabulary_bytes: Sequence[bytes], ids: Sequence[int], text: str) -> Tensor | None:
    """Spans (n, 2) of the tokens ``ids`` in ``text``; ``vocabulary_bytes`` are the tokenizer's :func:`token_bytes`.

    The tokens may start with a space that the text does not have (SentencePiece), which is cut off, and may leave out
    the text's beginning (a raw text's first token is no label). They may lack white space at the text's edges, which
    some chat templates trim, and have more of it at the end, which some print in front of the closing token. ``None``
    if they do not write the text otherwise, as behind a tokenizer that normalises it.
    """
    tokens = [vocabulary_bytes[i] for i in ids]
    place = _place(b"".join(tokens), text)
    if place is None:
        return None
    offset, first, last = place
    lengths = torch.tensor([len(token) for token in tokens], dtype=torch.long)
    ends = lengths.cumsum(0) + offset
    return torch.stack([ends - lengths, ends], 1).clamp(first, last)


def _place(written: bytes, text: str) -> tuple[int, int, int] | None:
    """Where ``written`` begins in the bytes of ``text``, and where what it covers begins and ends; None if nowhere."""
    whole = text.encode()
    if whole.endswith(written):
        return len(whole) - len(written), 0, len(whole)
    before, body, behind = (part.encode() for part in split_edges(text))
    start = written.find(body)
    if start < 0 or not body:
        return None
    leading = written[:start]
    trailing = written[start + len(body) :]
    if not before.endswith(leading):
        leading = leading.removeprefix(b" ")  # SentencePiece's
    if not before.endswith(leading) or trailing.strip():
        return None
    kept = next(n for n in range(len(trailing), -1, -1) if behind.startswith(trailing[:n]))
    return len(before) - start, len(before) - len(leading), len(before) + len(body) + kept


def row_spans(
    vocabulary_bytes: Sequence[bytes], labels: Sequence[int], starts: Sequence[int], texts: Sequence[str]
) -> Tensor:
    """Spans (rows, 2) of a sample's label rows.

    ``starts`` are the first rows of the responses ``texts``; the last label of each is its closing token. In a response
    whose tokens do not write its text, all but the closing token get empty spans, which match nothing.
    """
    parts = []
    base = 0
    for start, stop, text in zip(starts, [*starts[1:], len(labels)], texts, strict=True):
        length = len(text.encode())
        spans = token_spans(vocabulary_bytes, labels[start : stop - 1], text)
        if spans is None:
            spans = torch.zeros(stop - 1 - start, 2, dtype=torch.long)
        parts.append(base + torch.cat([spans, torch.tensor([[length, length + 1]])]))
        base += length + 1
    return torch.cat(parts)


def match_spans(student: Tensor, teacher: Tensor) -> Tensor:
    """For each student row the teacher row of the same span, -1 if there is none: (N,) from spans (N, 2) and (M, 2)."""
    rows = {(start, end): j for j, (start, end) in enumerate(teacher.tolist()) if start < end}
    return torch.tensor([rows.get((start, end), -1) for start, end in student.tolist()], dtype=torch.long)


def join_matches(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Matches of a batch's samples (:func:`match_spans`) as one tensor of the batch's teacher rows; -1 stays -1.

    ``sizes`` are the numbers of teacher rows of the samples.
    """
    first_rows = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([torch.where(part < 0, part, part + first) for part, first in zip(parts, first_rows, strict=True)])


def redistribute_by_bytes(student: Tensor, teacher: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Redistribute ``values (M, k)`` in nats from the teacher's rows to the student's: ``(N, k)``, and a mask (N,).

    ``student (N, 2)`` and ``teacher (M, 2)`` are spans. ``out_i = sum_j values_j |span_i and span_j| / |span_j|``:
    each token's value is spread evenly over its bytes and summed over the student's bytes. So a sample's total is kept
    (the chain rule, for -log p and for entropies), whichever model has the finer tokens, and equal spans keep their
    value. The mask is 1 where the teacher has rows for all bytes of the student's row.
    """
    lengths = teacher[:, 1] - teacher[:, 0]
    row_of_byte = torch.repeat_interleave(torch.arange(len(teacher)), lengths)  # (bytes,)
    first_byte = (lengths.cumsum(0) - lengths)[row_of_byte]  # of the row, among all bytes that are covered
    byte = teacher[row_of_byte, 0] + torch.arange(len(row_of_byte)) - first_byte
    per_byte = values.double() / lengths[:, None]  # (M, k)
    per_byte = torch.cat([per_byte, torch.ones(len(values), 1)], 1)[row_of_byte]  # (bytes, k + 1), 1 for being covered
    size = int(max(student.max(), teacher.max())) + 1
    cumulative = torch.zeros(size, per_byte.shape[1], dtype=torch.float64)
    cumulative = cumulative.index_copy(0, byte + 1, per_byte).cumsum(0)  # row b: the sum over the bytes before b
    sums = cumulative[student[:, 1]] - cumulative[student[:, 0]]  # (N, k + 1)
    width = student[:, 1] - student[:, 0]
    covered = (sums[:, -1] == width) & (width > 0)
    return sums[:, :-1].to(values.dtype), covered.to(values.dtype)
