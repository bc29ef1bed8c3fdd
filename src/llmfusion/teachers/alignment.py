"""Which teacher rows and student rows speak of the same text.

Two models write the same response in different tokens. Each token covers a span of the response's UTF-8 bytes, and the end
token behind a response covers one byte more, which no text has. Rows whose labels cover the same span predict the same
thing after the same words (exact token alignment, DSKDv2). Bytes and not characters: byte-level tokens split characters.

A span is ``[start, end)``; the spans of a sample are an int64 tensor (rows, 2), its responses laid end to end.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmfusion.data.samples import Sample
from llmfusion.errors import UserError

SPACE = "▁"  # SentencePiece's
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's fallback for a byte


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token id writes; ids without a token write none.

    Reads byte-level vocabularies (GPT-2, Llama 3, Qwen, GPT-NeoX, DeepSeek) and SentencePiece's, with or without byte
    fallback. Raises :class:`UserError` for others, whose tokens do not say what text they stand for.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    own = [token for token in vocabulary if token not in added]
    if all(ALPHABET.keys() >= set(token) for token in own):
        read = _byte_level
    elif any(token.startswith(SPACE) for token in own):
        read = _sentencepiece
    else:
        raise UserError(
            f"a {type(tokenizer).__name__} of {len(vocabulary)} tokens is neither byte-level nor SentencePiece: its tokens cannot be aligned by text"
        )
    out = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        out[i] = token.encode() if token in added else read(token)
    return out


def _alphabet() -> dict[str, int]:
    """Byte of each character of the byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    return bytes(ALPHABET[character] for character in token)


def _sentencepiece(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def responses(sample: Sample) -> list[str]:
    """The texts whose tokens are labels: every assistant turn, or the raw text."""
    return (
        [sample["text"]] if "text" in sample else [m["content"] for m in sample["messages"] if m["role"] == "assistant"]
    )


def spans(pieces: Sequence[bytes], ids: Sequence[int], text: str) -> Tensor | None:
    """Spans (n, 2) of the tokens ``ids`` in ``text``; ``pieces`` are the vocabulary's :func:`token_bytes`.

    The tokens may start with a space that the text does not have (SentencePiece), which is cut off, and may leave out the
    text's beginning (a raw text's first token is no label). ``None`` if they do not write the text otherwise, as behind a
    tokenizer that normalises it.
    """
    tokens, whole = [pieces[i] for i in ids], text.encode()
    written = b"".join(tokens)
    if not whole.endswith(written) and written != b" " + whole:
        return None
    lengths = torch.tensor([len(token) for token in tokens], dtype=torch.long)
    ends = lengths.cumsum(0) + len(whole) - len(written)
    return torch.stack([ends - lengths, ends], 1).clamp(min=0)


def row_spans(pieces: Sequence[bytes], labels: Sequence[int], starts: Sequence[int], texts: Sequence[str]) -> Tensor:
    """Spans (rows, 2) of a sample's label rows.

    ``starts`` are the first rows of the responses ``texts``; the last label of each is its end token. In a response whose
    tokens do not write its text, all but the end token get empty spans, which match nothing.
    """
    out, base = [], 0
    for start, stop, text in zip(starts, [*starts[1:], len(labels)], texts, strict=True):
        length = len(text.encode())
        found = spans(pieces, labels[start : stop - 1], text)
        inside = torch.zeros(stop - 1 - start, 2, dtype=torch.long) if found is None else found
        out.append(base + torch.cat([inside, torch.tensor([[length, length + 1]])]))
        base += length + 1
    return torch.cat(out)


def match_spans(student: Tensor, teacher: Tensor) -> Tensor:
    """For each student row the teacher row with the same span, -1 if there is none: (N,) from spans (N, 2) and (M, 2)."""
    rows = {(start, end): j for j, (start, end) in enumerate(teacher.tolist()) if start < end}
    return torch.tensor([rows.get((start, end), -1) for start, end in student.tolist()], dtype=torch.long)


def join_matches(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Partners of the samples of a batch, as row numbers of the batch; ``sizes`` are the samples' numbers of teacher rows."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([torch.where(part < 0, part, part + first) for part, first in zip(parts, firsts, strict=True)])


def redistribute_by_bytes(student: Tensor, teacher: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Hand what the teacher says at its rows, ``values (M, k)`` in nats, over to the student's rows: ``(N, k)``, and a mask (N,).

    ``out_i = sum_j values_j |span_i and span_j| / |span_j|``: each token's value is spread evenly over its bytes and summed
    over the student's bytes. So a sample's total is kept (the chain rule, for -log p and for entropies), whoever has the finer
    tokens, and equal spans hand over the value as it is. The mask is 1 where the teacher has rows for all bytes of the row.
    """
    lengths = teacher[:, 1] - teacher[:, 0]
    of = torch.repeat_interleave(torch.arange(len(teacher)), lengths)  # (bytes,) the row that covers each byte
    byte = teacher[of, 0] + torch.arange(len(of)) - (lengths.cumsum(0) - lengths)[of]
    each = torch.cat([values.double() / lengths[:, None], torch.ones(len(values), 1)], 1)[
        of
    ]  # a byte's values, and 1 for being covered
    before = torch.zeros(
        int(max(student.max(), teacher.max())) + 1, each.shape[1], dtype=torch.float64
    )  # row b: bytes before b
    before = before.index_copy(0, byte + 1, each).cumsum(0)
    out = before[student[:, 1]] - before[student[:, 0]]
    wide = student[:, 1] - student[:, 0]
    return out[:, :-1].to(values.dtype), ((out[:, -1] == wide) & (wide > 0)).to(values.dtype)
