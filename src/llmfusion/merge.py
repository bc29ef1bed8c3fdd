"""Step ``merge``, and the command line tool for any checkpoints.

In the workflow: ``python -m llmfusion.merge --spec ... --out results/models/merged/NAME/manifest.json --inputs ...``.
By hand: ``python -m llmfusion.merge --method ta --pivot DIR --models DIR DIR --out DIR [--set weight=0.5]``.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from llmfusion.artifacts import require
from llmfusion.config.errors import from_pydantic
from llmfusion.config.merging import Merge
from llmfusion.config.plan import dump
from llmfusion.config.strict_yaml import load_text
from llmfusion.errors import UserError
from llmfusion.merging.engine import merge
from llmfusion.merging.tensors import weight_files
from llmfusion.models.card import write_card
from llmfusion.step import Job, run


def build(job: Job) -> None:
    """Merge the parents' deltas over the pivot."""
    spec = job.spec["merge"]
    pivot, parents = job.input(f"models/{spec['pivot']}"), [job.input(f"models/{p}") for p in spec["parents"]]
    job.need(f"a merge over {spec['pivot']}", sum(path.stat().st_size for path in weight_files(pivot.folder)))
    facts = merge(pivot.folder, [p.folder for p in parents], spec["method"], spec, job.folder)
    options = {key: value for key, value in spec.items() if key not in ("method", "pivot", "parents")}
    write_card(job.folder, spec["method"], spec["pivot"], spec["parents"], options)
    same = {
        key: pivot.facts[key] for key in ("architecture", "hidden_size", "vocabulary_size", "vocabulary_sha256", "tokenizer_size", "eos_token", "max_positions")
    }
    job.facts.update({**same, **facts})
    print(f"{facts['tensors']} tensors, {facts['parameters']:,} values, {facts['changed']:.1%} of them changed")


def by_hand(arguments: list[str]) -> int:
    """Merge checkpoints outside a study. Returns the exit status; 2 for wrong options."""
    parser = argparse.ArgumentParser(prog="python -m llmfusion.merge", description="Merge checkpoints fine-tuned from one pivot.")
    parser.add_argument("--method", required=True, help="ta, ties, sce or rsaf")
    parser.add_argument("--pivot", required=True, type=Path, help="folder of the model all others started from")
    parser.add_argument("--models", required=True, nargs="+", type=Path, help="folders of the models to merge")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="options of the method, e.g. weight=0.5,0.5")
    given = parser.parse_args(arguments)
    place = given.out.resolve()
    draft = place.parent / f".{place.name}.draft"
    try:
        options = parse_options(given.method, given.set, len(given.models))
        require(not given.out.exists(), f"{given.out}: exists already; take another name or move it away")
        for folder in (given.pivot, *given.models):
            require(folder.is_dir(), f"{folder}: is no folder")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        facts = merge(given.pivot, given.models, given.method, options, draft)
        write_card(draft, given.method, str(given.pivot), [str(m) for m in given.models], options)
        os.rename(draft, given.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{given.out}: {facts['tensors']} tensors, {facts['parameters']:,} values, {facts['changed']:.1%} of them changed")
    return 0


def parse_options(method: str, pairs: list[str], count: int) -> dict:
    """Options from ``KEY=VALUE`` words, checked as a study's would be. Raises :class:`UserError` with all mistakes."""
    entry: dict = {"method": method, "pivot": "base/pivot", "parents": [f"trained/{i}" for i in range(count)]}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals), f"--set {pair}: expected KEY=VALUE")
        require(key not in ("method", "pivot", "parents"), f"--set {pair}: {key} is no option of the method; give --method, --pivot or --models")
        try:
            entry[key] = load_text(f"[{value}]" if "," in value else value)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # the last two: PyYAML on "!!bool x"
            raise UserError(f"--set {pair}: expected a number, a word or a list of numbers with commas between") from None
    adapter = TypeAdapter(Merge)
    try:
        checked = adapter.validate_python(entry)
    except ValidationError as error:
        raise UserError("\n  ".join(f"{'.'.join(map(str, p.key))}: {p.text}" for p in from_pydantic(error, entry, adapter.json_schema()))) from None
    weight = getattr(checked, "weight", None)
    if isinstance(weight, list):
        require(len(weight) == count, f"weight: {len(weight)} values for {count} models; give one value, or one each")
    return dump(checked, "pivot", "parents")


if __name__ == "__main__":
    sys.exit(run("merge", build) if "--spec" in sys.argv else by_hand(sys.argv[1:]))
