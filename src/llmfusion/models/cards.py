"""Model cards: what a checkpoint is and where it comes from, readable where the folder ends up."""

from pathlib import Path
from typing import Any

from llmfusion.study.schema.base import dump
from llmfusion.study.schema.training import TrainedModel

METHODS = {
    "sft": "Supervised fine-tuning", "seqkd": "Sequence-level distillation (SeqKD)", "kd": "Knowledge fusion", "naive": "Unified fusion, naive",
    "minilogit": "Unified fusion, Minilogit", "mince": "Unified fusion, MinCE", "udf": "Unified fusion, UDF",
}  # fmt: skip
PAPER = "InfiFusion, arXiv 2501.02795v1 (https://arxiv.org/abs/2501.02795v1)"
USED = ("init", "mix", "generated", "teachers", "fusion")  # told in sentences, not among the options


def write_training_card(
    folder: Path, run: TrainedModel, facts: dict[str, Any], datasets: list[str], licences: list[str]
) -> None:
    """README.md of a trained checkpoint, from its spec ``run`` and ``facts``: the same bytes at every run."""
    method = run.fusion.target if run.fusion else "seqkd" if run.generated else "sft"
    fusion = dump(run.fusion) if run.fusion else {}
    about = dump(run, *USED) | {f"fusion.{key}": value for key, value in fusion.items()}
    lines = [
        "---",
        f"tags: [{method}, llm-fusion-workflow]",
        "---",
        "",
        "# Trained model",
        "",
        f"{METHODS[method]}, trained with llm-fusion-workflow after {PAPER}.",
        "",
        f"- pivot: {run.init}",
        *(f"- teacher: {name}" for name in run.teachers),
        f"- data: {facts['samples']:,} samples of the mix {run.mix}"
        + (f" (datasets {', '.join(datasets)})" if datasets else ""),
        *(f"- answers to it that were trained on as well: {name}'s" for name in run.generated),
        f"- {facts['steps']:,} steps of {run.batch_size} samples at a peak learning rate of {run.lr:g}; last loss {facts['loss']:.4f} nats a token",
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
