"""A model as lm-eval asks it."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmfusion.data.chat import chat_format, prompt_ids, prompt_text
from llmfusion.data.turns import Message
from llmfusion.errors import UserError


class ChatModel(HFLM):  # type: ignore[misc]
    """lm-eval's model of transformers, asked with the text and the token ids that stand before an answer in training.

    lm-eval would ask with ``add_generation_prompt``, which some templates print otherwise, without a bound on what the
    template does; and it would read the special tokens that a question writes out as tokens.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._asked: dict[str, list[Message]] = {}  # the conversation of each prompt

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises :class:`UserError` where the template refuses to ask."""
        if not add_generation_prompt:
            raise UserError("a prompt that begins the answer cannot be asked")
        text = prompt_text(chat_history, self.tokenizer)
        if chat_format(self.tokenizer).has_quoted(chat_history):
            self._asked[text] = chat_history
        return text

    def tok_encode(self, string: str, *args: Any, left_truncate_len: int | None = None, **options: Any) -> list[int]:
        """Ids of a prompt."""
        if string in self._asked:
            ids = prompt_ids(self._asked[string], self.tokenizer)
            assert not isinstance(ids, str)  # it was rendered
        else:
            ids = super().tok_encode(string, False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of prompts, (B, T) each, padded on the left."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        return ids, mask
