"""Ask a model a batch of tasks through lm-eval and keep every answer. Grading is another step, without a model."""

import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError, require
from llmfusion.evaluation.items import items_of
from llmfusion.evaluation.task_format import Item, load_format
from llmfusion.io.jsonl import write_jsonl
from llmfusion.io.templates import compiled
from llmfusion.models.loading import end_tokens
from llmfusion.study.schema.data import TaskPrompt


def ask(
    model: Any, tokenizer: Any, tasks: dict[str, TaskPrompt], staged: dict[str, Artifact], batch_size: int, folder: Path
) -> dict[str, Any]:
    """Write ``TASK.jsonl`` (item number, prompt, answer) for each task. Returns facts by task.

    ``tasks`` maps a name to its format, shots, prompt and max_new_tokens, ``staged`` to its items. Decoding is greedy,
    through the tokenizer's chat template. Raises :class:`UserError` where a prompt leaves no room for the answer.
    """
    language_model = _language_model(model, tokenizer, batch_size)
    for name, task in tasks.items():
        require(
            _longest_prompt(language_model, task) > 0,
            f"task {name}: max_new_tokens {task.max_new_tokens} fill the model's {language_model.max_length} "
            "positions; ask for fewer",
        )
    results = _evaluate(language_model, [config(name, task, staged[name]) for name, task in tasks.items()])
    facts = {}
    for name, task in tasks.items():
        samples = sorted(results["samples"][name], key=lambda s: s["doc"]["item"])
        rows = [{"item": s["doc"]["item"], "prompt": s["arguments"][0][0], "answer": s["resps"][0][0]} for s in samples]
        _require_whole_prompts(name, task, rows, language_model)
        expected = len(items_of(staged[name], task.format, limit=task.limit))
        if len(rows) != expected:
            raise UserError(f"task {name}: {expected} items asked, {len(rows)} answers came back")
        write_jsonl(folder / f"{name}.jsonl", rows)
        facts[name] = {
            "items": len(rows),
            "shots": task.shots,
            "format": task.format,
            "format_version": results["versions"][name],
        }
    return {
        "tasks": facts,
        "backend": f"lm-eval {metadata.version('lm_eval')} hf",
        "decoding": "greedy",
        "batch_size": batch_size,
    }


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The model as lm-eval calls it, with generation settings of our own, asked in the words it was trained with.

    The model's own settings may bring a repetition penalty or sampling, and greedy means neither.
    """
    from transformers import GenerationConfig

    from llmfusion.evaluation.language_model import ChatModel

    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return ChatModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)


def _evaluate(language_model: Any, configs: list[dict[str, Any]]) -> Any:
    """lm-eval's results with every sample, and no metric.

    What simple_evaluate(predict_only=True) does, without its second of questions about the machine.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load(configs)
    for task in loaded["tasks"].values():
        task.override_metric("bypass")
    return evaluate(language_model, loaded, apply_chat_template=True, bootstrap_iters=0, log_samples=True)


def _longest_prompt(language_model: Any, task: TaskPrompt) -> int:
    """Tokens a prompt may have so that there is room for the answer."""
    return language_model.max_length - task.max_new_tokens


def _require_whole_prompts(name: str, task: TaskPrompt, rows: list[dict[str, Any]], language_model: Any) -> None:
    """Raise :class:`UserError` where prompts were longer than the model takes: lm-eval cuts their beginning."""
    longest = _longest_prompt(language_model, task)
    excess = [len(language_model.tok_encode(row["prompt"])) - longest for row in rows]
    require(
        max(excess) <= 0,
        f"task {name}: {sum(tokens > 0 for tokens in excess)} of {len(rows)} prompts do not fit the model's "
        f"{language_model.max_length} positions beside {task.max_new_tokens} new tokens (by up to {max(excess)}); "
        "they would be asked without their beginning. Lower shots or max_new_tokens",
    )


def config(name: str, task: TaskPrompt, staged: Artifact) -> dict[str, Any]:
    """lm-eval's configuration of one task: the format's templates, the study's prompt and limits, the staged items."""
    import datasets

    task_format = load_format(task.format)
    text = task.prompt or task_format.doc_to_text
    items = items_of(staged, task.format, limit=task.limit)
    if task.shots:
        examples = items_of(staged, task.format, "shots")
        items = with_shots(items, examples, task.shots, text, task_format.doc_to_target, name)
        text = "{{ shots }}" + text
    return {
        "task": name,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": _compiled(text, f"tasks.{name}.prompt"),
        "doc_to_target": _compiled(task_format.doc_to_target, f"the answer of format {task.format}"),
        "num_fewshot": 0,  # shots are in the prompt: chosen by subject, for which lm-eval would need a task a subject
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": task.max_new_tokens,
        },
        "metadata": {"version": task_format.version},
    }


def _compiled(text: str, name: str) -> Callable[[Item], str]:
    """Renders an item as lm-eval would, but compiled once, and in a sandbox (:mod:`llmfusion.io.templates`).

    A function, as lm-eval copies the configuration deeply, which a template does not survive.
    """
    template = compiled(text, name, "prompt")
    return lambda item: template.render(**item)


def with_shots(
    items: list[Item], examples: list[Item], count: int, prompt: str, target: str, name: str = "shots"
) -> list[Item]:
    """Items with a field ``shots``: the first ``count`` examples of the item's subject, each asked and answered.

    An example's ``solution`` is its answer; without one it is what ``target`` renders. ``name`` is the task's, for
    errors. Raises :class:`UserError` where a subject has too few.
    """
    question = compiled(prompt, f"tasks.{name}.prompt", "prompt without trailing newline")
    answer = compiled(target, f"the answers of task {name}", "prompt without trailing newline")
    by_subject: dict[str, list[Item]] = {}
    for example in examples:
        by_subject.setdefault(example.get("subject", ""), []).append(example)
    out = []
    for item in items:
        chosen = by_subject.get(item.get("subject", ""), [])[:count]
        if len(chosen) < count:
            raise UserError(f"{count} shots asked, {len(chosen)} there for subject {item.get('subject', '')!r}")
        texts = [f"{question.render(**e)}\n{e.get('solution') or answer.render(**e)}\n\n" for e in chosen]
        out.append({**item, "shots": "".join(texts)})
    return out
