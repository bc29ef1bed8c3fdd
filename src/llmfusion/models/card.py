"""Model cards: what a checkpoint is and where it comes from, readable where the folder ends up."""

from pathlib import Path
from typing import Any


def write_card(folder: Path, method: str, pivot: str, models: list[str], options: dict[str, Any], facts: dict[str, Any]) -> None:
    """README.md of a merged checkpoint: method, parents, every option in force, and what the merge changed."""
    lines = [
        "---",
        "tags: [merge, llm-fusion-workflow]",
        "---",
        "",
        "# Merged model",
        "",
        f"Method `{method}`, merged with llm-fusion-workflow.",
        "",
        f"- pivot: {pivot}",
        *(f"- model: {m}" for m in models),
        "",
        "Options:",
        *[f"- {key}: {value}" for key, value in sorted(options.items())],
        "",
        f"{facts['parameters']:,} values in {facts['tensors']} tensors; {facts['changed']:.2%} of them differ from the pivot's, and {facts['kept']:.2%} of the",
        "sum of squares of the models' differences took part. `merge_report.csv` and `merge_report.json` say so for each tensor.",
        *(["", f"**Warning**: {facts['warning']}."] if "warning" in facts else []),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


METHODS = {
    "sft": "Supervised fine-tuning", "seqkd": "Sequence-level distillation (SeqKD)", "kd": "Knowledge fusion", "naive": "Unified fusion, naive",
    "minilogit": "Unified fusion, Minilogit", "mince": "Unified fusion, MinCE", "udf": "Unified fusion, UDF",
}  # fmt: skip
PAPER = "InfiFusion, arXiv 2501.02795v1 (https://arxiv.org/abs/2501.02795v1)"
USED = ("init", "mix", "generated", "teachers", "fusion")  # told in sentences, not among the options


def write_training_card(folder: Path, run: dict[str, Any], facts: dict[str, Any], datasets: list[str], licences: list[str]) -> None:
    """README.md of a trained checkpoint, from its spec ``run`` and ``facts``: the same bytes at every run."""
    fusion = run.get("fusion", {})
    method = fusion.get("target", "seqkd" if run.get("generated") else "sft")
    about = {key: value for key, value in run.items() if key not in USED} | {f"fusion.{key}": value for key, value in fusion.items()}
    lines = [
        "---",
        f"tags: [{method}, llm-fusion-workflow]",
        "---",
        "",
        "# Trained model",
        "",
        f"{METHODS[method]}, trained with llm-fusion-workflow after {PAPER}.",
        "",
        f"- pivot: {run['init']}",
        *(f"- teacher: {name}" for name in run.get("teachers", [])),
        f"- data: {facts['samples']:,} samples of the mix {run['mix']}" + (f" (datasets {', '.join(datasets)})" if datasets else ""),
        *(f"- answers to it that were trained on as well: {name}'s" for name in run.get("generated", [])),
        f"- {facts['steps']:,} steps of {run.get('batch_size', 16)} samples at a peak learning rate of {run['lr']:g}; last loss {facts['loss']:.4f} nats a token",
        f"- licence of the pivot: {', '.join(licences) or 'none declared'}; teachers and data have their own",
        "",
        "Options that are not the default:",
        *[f"- {key}: {value}" for key, value in sorted(about.items())],
        "",
        "Tokenizer, chat template and generation settings are the pivot's. `metrics.jsonl` holds the loss and its terms. To load it:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))
