"""SeqKD: a source model's greedy answers, in its own chat template, ended by the template's closing token."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from llmfusion.data.chat import chat_format, prompt_ids
from llmfusion.data.rejections import Rejected
from llmfusion.data.samples import Sample
from llmfusion.models.loading import end_tokens


def answer_all(
    model: Any, tokenizer: Any, samples: Sequence[Sample], max_length: int, batch_size: int, rejected: Rejected
) -> list[Sample]:
    """The samples with the last assistant turn replaced by the model's answer, in the given order.

    Earlier turns keep their gold text. Left out and counted in ``rejected``: prompts that leave no room (``too
    long``) or that the template refuses, answers without a closing token within ``max_length`` tokens, prompt included
    (``unfinished``), and without text (``empty``).
    """
    prompts = _prompts(tokenizer, samples, max_length, rejected)
    # generate() takes what its settings leave open from the model's own, which may bring a repetition penalty
    ends = end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig()
    answers: dict[int, str] = {}
    by_length = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        texts = _answer_batch(model, tokenizer, [prompts[i] for i in batch], max_length, ends)
        for i, text in zip(batch, texts, strict=True):
            if text is None or not text.strip():
                rejected.add("unfinished" if text is None else "empty", samples[i]["id"])
            else:
                answers[i] = text
    return [_with_answer(samples[i], answers[i]) for i in sorted(answers)]


def _prompts(tokenizer: Any, samples: Sequence[Sample], max_length: int, rejected: Rejected) -> dict[int, list[int]]:
    """Token ids of the prompts that leave room for an answer, by the sample's number."""
    prompts: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        ids = prompt_ids(sample["messages"][:-1], tokenizer)
        if isinstance(ids, str):
            rejected.add(ids, sample["id"])
        elif len(ids) < max_length:
            prompts[i] = ids
        else:
            rejected.add("too long", sample["id"])
    return prompts


@torch.inference_mode()
def _answer_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_length: int, ends: list[int]
) -> list[str | None]:
    """Greedy answers; None where no end token came within ``max_length`` tokens, padding not counted."""
    ids, mask = _pad_left(prompts, tokenizer.pad_token_id)  # (B, T)
    device = next(model.parameters()).device
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_length - min(map(len, prompts)),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    generated = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=greedy)
    answers = []
    for prompt, tokens in zip(prompts, generated[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i for i, token in enumerate(tokens[: max_length - len(prompt)]) if token in ends), None)
        answers.append(None if end is None else tokenizer.decode(tokens[:end], skip_special_tokens=True))
    space = chat_format(tokenizer).closings[0].space  # that the template prints between an answer and its closing token
    return [None if answer is None else answer.removesuffix(space) for answer in answers]


def _pad_left(prompts: list[list[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, T) int64 each, padded on the left: the answer follows the prompt."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _with_answer(sample: Sample, answer: str) -> Sample:
    messages = [*sample["messages"][:-1], {"role": "assistant", "content": answer}]
    name = hashlib.sha1(f"{sample['id']}\n{answer}".encode()).hexdigest()
    return {**sample, "id": name, "messages": messages}
