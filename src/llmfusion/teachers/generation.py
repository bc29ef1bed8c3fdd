"""SeqKD: a source model's greedy answers, in its own chat template, ended by its own end token."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from llmfusion.data.chat import prompt_text
from llmfusion.data.samples import Sample
from llmfusion.data.sources import Rejected
from llmfusion.models.loading import end_tokens


def answer_all(
    model: Any, tokenizer: Any, samples: Sequence[Sample], max_length: int, batch_size: int, rejected: Rejected
) -> list[Sample]:
    """The samples with the last assistant turn replaced by the model's answer, in the given order.

    Earlier turns keep their gold text. Left out and counted: prompts that leave no room (``too long``), answers without an
    end token (``unfinished``) and without text (``empty``).
    """
    prompts = {
        i: tokenizer(prompt_text(s["messages"][:-1], tokenizer), add_special_tokens=False)["input_ids"]
        for i, s in enumerate(samples)
    }
    for i in [i for i, prompt in prompts.items() if len(prompt) >= max_length]:
        rejected.add("too long", samples[i]["id"])
        del prompts[i]
    answers: dict[int, str] = {}
    # generate() takes what its settings leave open from the model's own, which may bring a repetition penalty: greedy has none
    ends = end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig()
    by_length = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        for i, text in zip(
            batch, _answer(model, tokenizer, [prompts[i] for i in batch], max_length, ends), strict=True
        ):
            if text is None or not text.strip():
                rejected.add("unfinished" if text is None else "empty", samples[i]["id"])
            else:
                answers[i] = text
    return [_with_answer(samples[i], answers[i]) for i in sorted(answers)]


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, prompts: list[list[int]], max_length: int, ends: list[int]) -> list[str | None]:
    """Greedy continuations of equally padded prompts; None where no end token came within ``max_length``, padding not counted."""
    longest, room = max(map(len, prompts)), max_length - min(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)  # padded on the left: the answer follows the prompt
        mask[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    answers = []
    for prompt, tokens in zip(prompts, out[:, longest:].tolist(), strict=True):
        end = next((i for i, token in enumerate(tokens[: max_length - len(prompt)]) if token in ends), None)
        answers.append(None if end is None else tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return answers


def _with_answer(sample: Sample, answer: str) -> Sample:
    messages = [*sample["messages"][:-1], {"role": "assistant", "content": answer}]
    name = hashlib.sha1(f"{sample['id']}\n{answer}".encode()).hexdigest()
    return {**sample, "id": name, "messages": messages}
