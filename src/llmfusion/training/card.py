"""Model cards: what a checkpoint is and where it comes from, readable where the folder ends up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmfusion.study.fusion_targets import target_class
from llmfusion.study.schema.base import dump
from llmfusion.study.schema.training import TrainedModel

PAPER = "InfiFusion, arXiv 2501.02795v1 (https://arxiv.org/abs/2501.02795v1)"
IN_SENTENCES = ("init", "mix", "generated", "teachers", "fusion")  # not repeated among the options
USAGE = """\
Tokenizer, chat template and generation settings are the pivot's. \
`metrics.jsonl` holds the loss and its terms. To load it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def write_training_card(
    folder: Path, run: TrainedModel, facts: dict[str, Any], datasets: list[str], licences: Sequence[str]
) -> None:
    """Write README.md of a trained checkpoint, from its spec ``run`` and its ``facts``: the same bytes at every run.

    ``datasets``: those of the mix; ``licences``: a line for each licence of what it was made from.
    """
    method, title = _method(run)
    lines = [
        "---",
        f"tags: [{method}, llm-fusion-workflow]",
        "---",
        "",
        "# Trained model",
        "",
        f"{title}, trained with llm-fusion-workflow after {PAPER}.",
        "",
        *_origin(run, facts, datasets),
        "",
        "Licences stated for what it was made from:",
        *licences,
        "",
        "Options that are not the default:",
        *[f"- {key}: {value}" for key, value in sorted(_options(run).items())],
        "",
        USAGE,
    ]
    (folder / "README.md").write_text("\n".join(lines))


def _method(run: TrainedModel) -> tuple[str, str]:
    """Its short name and its title."""
    if run.fusion:
        return run.fusion.target, target_class(run.fusion.target).title
    if run.generated:
        return "seqkd", "Sequence-level distillation (SeqKD)"
    return "sft", "Supervised fine-tuning"


def _origin(run: TrainedModel, facts: dict[str, Any], datasets: list[str]) -> list[str]:
    """One line for each thing it was made from."""
    of_datasets = f" (datasets {', '.join(datasets)})" if datasets else ""
    rate = f"a peak learning rate of {run.lr:g}"
    return [
        f"- pivot: {run.init}",
        *(f"- teacher: {name}" for name in run.teachers),
        f"- data: {facts['samples']:,} samples of the mix {run.mix}{of_datasets}",
        *(f"- answers to it that were trained on as well: {name}'s" for name in run.generated),
        f"- {facts['steps']:,} steps of {run.batch_size} samples at {rate}; last loss {facts['loss']:.4f} nats a token",
    ]


def _options(run: TrainedModel) -> dict[str, Any]:
    """Options that are not the default."""
    fusion = dump(run.fusion) if run.fusion else {}
    return dump(run, *IN_SENTENCES) | {f"fusion.{key}": value for key, value in fusion.items()}
