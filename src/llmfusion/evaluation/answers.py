"""Ask a model a batch of tasks through lm-eval and keep every answer. Grading is a separate step that needs no model."""

import logging
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # everything asked and answered is on disk: nothing may be fetched here
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"

import yaml

from llmfusion.artifacts.store import Artifact
from llmfusion.data.samples import write_jsonl
from llmfusion.errors import UserError, require
from llmfusion.evaluation.grading import items_of
from llmfusion.models.loading import end_tokens
from llmfusion.study.schema.data import TaskPrompt

FORMATS = Path(__file__).parent / "tasks"
Item = dict[str, Any]


def ask(
    model: Any, tokenizer: Any, tasks: dict[str, TaskPrompt], staged: dict[str, Artifact], batch_size: int, folder: Path
) -> dict[str, Any]:
    """Write ``TASK.jsonl`` (item number, prompt, answer) for each task. Returns facts by task.

    ``tasks`` maps a name to its format, shots, prompt and max_new_tokens, ``staged`` to its items. Decoding is greedy,
    through the tokenizer's chat template.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import GenerationConfig

    # settings of our own: the model's may bring a repetition penalty or sampling, and greedy means neither
    model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
    for name, task in tasks.items():
        require(
            _room(loaded, task) > 0,
            f"task {name}: max_new_tokens {task.max_new_tokens} fill the model's {loaded.max_length} positions; ask for fewer",
        )
    manager = TaskManager(include_path=str(FORMATS), include_defaults=False)
    configs = [config(name, task, staged[name]) for name, task in tasks.items()]
    asked = manager.load(configs)
    for task in asked["tasks"].values():
        task.override_metric(
            "bypass"
        )  # only answers: simple_evaluate's predict_only, without its second of questions about the machine
    found = evaluate(loaded, asked, apply_chat_template=True, bootstrap_iters=0, log_samples=True)
    facts = {}
    for name, task in tasks.items():
        samples = sorted(found["samples"][name], key=lambda s: s["doc"]["item"])
        rows = [{"item": s["doc"]["item"], "prompt": s["arguments"][0][0], "answer": s["resps"][0][0]} for s in samples]
        cut = [len(tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]) - _room(loaded, task) for r in rows]
        if max(cut) > 0:
            raise UserError(
                f"task {name}: {sum(c > 0 for c in cut)} of {len(rows)} prompts do not fit the model's {loaded.max_length} positions beside "
                f"{task.max_new_tokens} new tokens (by up to {max(cut)}); they would be asked without their beginning. Lower shots or max_new_tokens"
            )
        expected = len(items_of(staged[name], task.format))
        if len(rows) != expected:
            raise UserError(f"task {name}: {expected} items asked, {len(rows)} answers came back")
        write_jsonl(folder / f"{name}.jsonl", rows)
        facts[name] = {
            "items": len(rows),
            "shots": task.shots,
            "format": task.format,
            "format_version": found["versions"][name],
        }
    return {
        "tasks": facts,
        "backend": f"lm-eval {metadata.version('lm_eval')} hf",
        "decoding": "greedy",
        "batch_size": batch_size,
    }


def _room(loaded: Any, task: TaskPrompt) -> int:
    """Longest prompt in tokens that leaves room for the answer."""
    return loaded.max_length - task.max_new_tokens


def config(name: str, task: TaskPrompt, staged: Artifact) -> dict[str, Any]:
    """lm-eval's configuration of one task: the format's YAML, the study's prompt and limits, and the staged items."""
    import datasets

    base = yaml.safe_load((FORMATS / f"{task.format}.yaml").read_text())
    text = task.prompt or base["doc_to_text"]
    items = items_of(staged, task.format)
    if task.shots:
        items = with_shots(items, items_of(staged, task.format, "shots"), task.shots, text, base["doc_to_target"])
        text = "{{ shots }}" + text
    return {
        **base,
        "task": name,
        "doc_to_text": _compiled(text),
        "doc_to_target": _compiled(base["doc_to_target"]),
        "num_fewshot": 0,  # the shots are part of the prompt: chosen by subject, which lm-eval does only through 57 tasks
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "generation_kwargs": {**base["generation_kwargs"], "max_gen_toks": task.max_new_tokens},
    }


def _compiled(template: str) -> Callable[[Item], str]:
    """lm-eval's own rendering; given the text, it would compile it anew for every item, which costs more than a small model's answer."""
    from lm_eval.utils import env

    compiled = env.from_string(template)
    return lambda item: compiled.render(
        **item
    )  # a function: lm-eval copies the configuration deeply, which a template does not survive


def with_shots(items: list[Item], pool: list[Item], count: int, prompt: str, target: str) -> list[Item]:
    """Items with a field ``shots``: the first ``count`` examples of the item's subject, asked and answered, blank lines between."""
    import jinja2

    strict = jinja2.Environment(undefined=jinja2.StrictUndefined)
    ask_, answer = strict.from_string(prompt), strict.from_string(target)
    by_subject: dict[str, list[Item]] = {}
    for shot in pool:
        by_subject.setdefault(shot.get("subject", ""), []).append(shot)
    out = []
    for item in items:
        chosen = by_subject.get(item.get("subject", ""), [])[:count]
        if len(chosen) < count:
            raise UserError(f"{count} shots asked, {len(chosen)} there for subject {item.get('subject', '')!r}")
        told = [f"{ask_.render(**s)}\n{s.get('solution') or answer.render(**s)}\n\n" for s in chosen]
        out.append({**item, "shots": "".join(told)})
    return out
