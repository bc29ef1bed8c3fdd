"""Step ``merge``, and the command line tool for any checkpoints; both are thin calls of :mod:`llmfusion.merging.engine`.

In the workflow: ``python -m llmfusion.merge --spec ... --out results/models/merged/NAME/manifest.json --inputs ...``.
By hand: ``python -m llmfusion.merge --method sce --pivot DIR --models DIR DIR --out DIR [--set tau=0.1] [--threads 8] [--dry-run]``.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from llmfusion.artifacts import require, sha256_file
from llmfusion.config.errors import from_pydantic
from llmfusion.config.merging import Merge
from llmfusion.config.plan import dump
from llmfusion.config.strict_yaml import load_text
from llmfusion.errors import UserError
from llmfusion.lease import Lease
from llmfusion.merging.planning import Plan, default_threads, plan
from llmfusion.models.card import write_card
from llmfusion.step import Job, amount, run

SAME = ("architecture", "hidden_size", "vocabulary_size", "vocabulary_sha256", "tokenizer_size", "eos_token", "max_positions")  # as the pivot's


def build(job: Job) -> None:
    """Merge the parents' deltas over the pivot; a job that was killed goes on with the next tensor."""
    from llmfusion.merging import engine

    spec = job.spec["merge"]
    checked = TypeAdapter(Merge).validate_python(spec)
    pivot, parents = job.input(f"models/{spec['pivot']}"), [job.input(f"models/{parent}") for parent in spec["parents"]]
    work = plan(pivot.folder, [parent.folder for parent in parents], spec["method"], dump(checked, "method", "pivot", "parents"))
    place = job.work / "merge"
    kept = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    apart = job.folder.stat().st_dev != job.work.stat().st_dev
    job.need(f"a merge over {spec['pivot']}", work.written if apart else 0, max(0, work.written - kept))
    facts, _ = engine.run(work, place, job.key)
    write_card(place, spec["method"], spec["pivot"], spec["parents"], _in_force(checked), facts)
    for path in sorted(place.iterdir()):
        shutil.move(path, job.folder / path.name)
    place.rmdir()
    job.facts.update({key: pivot.facts[key] for key in SAME} | facts)
    print(_summary(facts))
    for told in [*work.matching.remarks, *([f"warning: {facts['warning']}"] if "warning" in facts else [])]:
        print(told)


def by_hand(arguments: list[str]) -> int:
    """Merge checkpoints outside a study. Returns the exit status; 2 for wrong options, checkpoints that do not fit and a full disk."""
    parser = argparse.ArgumentParser(prog="python -m llmfusion.merge", description="Merge checkpoints fine-tuned from one pivot.")
    parser.add_argument("--method", required=True, help="ta, ties, sce, rsaf or rsaf_literal")
    parser.add_argument("--pivot", required=True, type=Path, help="folder of the model all others started from")
    parser.add_argument("--models", required=True, nargs="+", type=Path, help="folders of the models to merge")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="options of the method, e.g. weight=0.5,0.5")
    parser.add_argument("--threads", type=int, default=None, help="tensors merged at a time; default: OMP_NUM_THREADS, else all cores")
    parser.add_argument("--dry-run", action="store_true", help="check, and tell what would be done; writes nothing")
    given = parser.parse_args(arguments)
    try:
        require(given.threads is None or given.threads > 0, f"--threads {given.threads}: expected 1 or more")
        checked = check_options(given.method, given.set, len(given.models))
        require(not given.out.exists(), f"{given.out}: exists already; take another name or move it away")
        for folder in (given.pivot, *given.models):
            require(folder.is_dir(), f"{folder}: is no folder")
        work = plan(given.pivot, given.models, given.method, dump(checked, "method", "pivot", "parents"))
        for remark in work.matching.remarks:
            print(f"note: {remark}", file=sys.stderr)
        if given.dry_run:
            print(_description(work, given))
        else:
            _merge(work, given, _in_force(checked))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the tensors that are missing", file=sys.stderr)
        return 130
    return 0


def _merge(work: Plan, given: argparse.Namespace, options: dict[str, Any]) -> None:
    """Merge into a draft beside the place, then rename. What is refused leaves nothing; what is killed leaves what it has finished."""
    from llmfusion.merging import engine

    place = given.out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    draft, started = place.parent / f".{place.name}.draft", time.monotonic()
    with Lease(place.parent / f".{place.name}.lease") as lease:
        require(not place.exists(), f"{place}: exists already; another process has just made it")
        needed, free = work.written - _size(draft), shutil.disk_usage(place.parent).free
        require(needed <= free, f"the merge needs {amount(needed)} more, {amount(free)} are free in {place.parent}: free some, or take another --out")
        try:
            facts, checksums = engine.run(work, draft, work.identity(), given.threads, engine.progress_line(started))
            write_card(draft, given.method, str(given.pivot), [str(m) for m in given.models], options, facts)
            (draft / "manifest.json").write_text(json.dumps(_manifest(work, draft, options, facts, checksums), indent=1) + "\n")
        except (UserError, OSError):
            shutil.rmtree(draft, ignore_errors=True)
            raise
        lease.check()  # outside: the draft may be another writer's now
        os.rename(draft, place)
    if "out_dtype" in work.options:
        print(f"note: config.json is the pivot's; load with dtype={options['out_dtype']!r} to have the weights as they are stored", file=sys.stderr)
    if "warning" in facts:
        print(f"warning: {facts['warning']}", file=sys.stderr)
    print(f"{given.out}: {_summary(facts)} in {time.monotonic() - started:.1f} s")


def _summary(facts: dict[str, Any]) -> str:
    return f"{facts['tensors']} tensors, {facts['parameters']:,} values, {facts['changed']:.1%} of them changed"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _description(work: Plan, given: argparse.Namespace) -> str:
    """What a merge would do, from headers."""
    threads = given.threads or default_threads()
    place = next(folder for folder in given.out.resolve().parents if folder.exists())
    merged = [part for part in work.parts if part.models]
    return "\n".join(
        [
            f"{given.method} of {len(given.models)} models over {given.pivot}, options: {work.options or 'all defaults'}",
            f"{len(merged)} tensors with {work.values:,} values are merged, {len(work.parts) - len(merged)} copied from the pivot",
            f"reads {work.read / 1e9:,.2f} GB, writes {work.written / 1e9:,.2f} GB in {len(work.files)} files to {given.out}",
            f"{shutil.disk_usage(place).free / 1e9:,.1f} GB are free there",
            f"about {work.seconds(threads):,.0f} s on {threads} threads, {amount(work.memory(threads))} of memory",
            "nothing was written (--dry-run)",
        ]
    )


def _manifest(work: Plan, folder: Path, options: dict[str, Any], facts: dict[str, Any], checksums: dict[str, str]) -> dict[str, Any]:
    """What the folder was made from and holds: sha256 of all files but the weights, whose tensors have an XXH3 checksum each.

    Inputs are told by their own manifest's sha256 where they have one, and by sizes and the sha256 of their headers.
    """
    inside = {name: {tensor: checksums[tensor] for tensor in layout.entries} for name, layout in work.files.items()}
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in inside)
    files: dict[str, Any] = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in others}
    files |= {name: {"size": work.files[name].size, "xxh3": tensors} for name, tensors in inside.items()}
    return {
        "made_by": "llmfusion.merge",
        "method": work.method,
        "options": options,
        "pivot": _told(work.matching.pivot.folder, {part.pivot.file for part in work.parts}),
        "models": [_told(model.folder, {entry.file for entry in model.entries.values()}) for model in work.matching.models],
        "files": files,
        "facts": facts,
    }


def _told(folder: Path, files: set[Path]) -> dict[str, Any]:
    own = folder / "manifest.json"
    headers = {file.name: {"size": file.stat().st_size, "header_sha256": _header_sha256(file)} for file in sorted(files)}
    return {"folder": str(folder), **({"manifest_sha256": sha256_file(own)} if own.is_file() else {}), "files": headers}


def _header_sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.sha256(handle.read(int.from_bytes(handle.read(8), "little"))).hexdigest()


def check_options(method: str, pairs: list[str], count: int) -> Any:
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
    adapter: TypeAdapter = TypeAdapter(Merge)
    try:
        checked = adapter.validate_python(entry)
    except ValidationError as error:
        raise UserError("\n  ".join(f"{'.'.join(map(str, p.key))}: {p.text}" for p in from_pydantic(error, entry, adapter.json_schema()))) from None
    weight = getattr(checked, "weight", None)
    if isinstance(weight, list):
        require(len(weight) == count, f"weight: {len(weight)} values for {count} models; give one value, or one each")
    return checked


def _in_force(checked: Any) -> dict[str, Any]:
    """Every option of a merge with the value it has, defaults included."""
    return {key: value for key, value in checked.model_dump(mode="json", by_alias=True).items() if key not in ("method", "pivot", "parents")}


def _as_a_process(arguments: list[str]) -> NoReturn:
    """:func:`by_hand`, without searching for garbage in what numba loads and taking it down at the end: a quarter of the start-up."""
    gc.disable()
    status = by_hand(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if "--spec" in sys.argv:
        sys.exit(run("merge", build))
    _as_a_process(sys.argv[1:])
