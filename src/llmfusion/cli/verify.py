"""Walk from a result (``results/table2.csv``, a score, a manifest) to every dataset and model hash behind it.

Every manifest and every file on the way is hashed anew, every artifact must have been made from exactly the inputs that
are there now, and its provenance must be that of its manifest. What lies in ``results/`` and belongs to no artifact is
named, too. With ``--recompute`` the cells behind the given results are graded again from the stored answers (programs
in the sandbox), and tables are made again from the cells. All mismatches are named; exit status 1 if there is one.
Licences of all inputs are listed at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llmfusion.errors import UserError, require

if TYPE_CHECKING:
    from llmfusion.artifacts.store import Artifact
    from llmfusion.artifacts.verification import Verification

RECOMPUTED = ("score", "table")  # steps that are cheap: they need no model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results to verify, and how far to go."""
    parser.add_argument(
        "targets", nargs="+", type=Path, metavar="FILE", help="a table, a score or a manifest: results/table2.csv, ..."
    )
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="also grade the cells behind these results again from the stored answers, and make tables again from them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify the given targets. Returns the exit status: 0, 1 for mismatches, 2 for what is no result of a study."""
    return max(_verify(target, arguments.recompute) for target in arguments.targets)


def _verify(target: Path, recompute: bool) -> int:
    from llmfusion.artifacts.verification import Verification
    from llmfusion.study.addresses import address_of, results_index

    try:
        require(target.exists(), f"{target}: is not there")
        directory = Path(*target.parts[: results_index(target)])
        address = address_of(target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    walk = Verification(directory)
    walk.verify(address)
    walk.find_strangers()
    made_again = _make_again(walk) if recompute else ""
    return _report(target, walk, made_again)


def _make_again(walk: Verification) -> str:
    """Make cells and tables again and compare them with what is there. Returns how many were, for the summary."""
    counts = dict.fromkeys(RECOMPUTED, 0)
    for address, artifact in walk.artifacts.items():
        step = str(artifact.spec.get("step"))
        inputs = {source: walk.artifacts[source] for source in artifact.manifest["inputs"] if source in walk.artifacts}
        if step in counts and len(inputs) == len(artifact.manifest["inputs"]):
            counts[step] += 1
            walk.mismatches += _differences(walk.directory, step, address, inputs, artifact)
    return f"{counts['score']} cells graded again, {counts['table']} tables made again, "


def _differences(
    directory: Path, step: str, address: str, inputs: dict[str, Artifact], artifact: Artifact
) -> list[str]:
    """What is not the same when a step makes an artifact again from the inputs that are there, in a folder aside."""
    from llmfusion.artifacts.job import Job
    from llmfusion.artifacts.store import draft_folder
    from llmfusion.io.files import sha256_file
    from llmfusion.study.addresses import manifest_of, output_of

    output = directory / output_of(address)
    with tempfile.TemporaryDirectory(prefix="llmfusion-verify-") as name:
        folder, work = Path(name) / draft_folder(output, "again").name, Path(name) / "work"
        folder.mkdir()
        work.mkdir()
        job = Job(artifact.manifest["spec"], inputs, folder, work, {}, "again", None)
        try:
            import_module(f"llmfusion.steps.{step}").build(job)
        except UserError as error:
            return [f"{manifest_of(output)}: cannot be made again: {error}"]
        hashes = {path.name: sha256_file(path) for path in folder.iterdir()}
    facts = artifact.manifest["facts"]
    found = [
        f"{key} {facts.get(key)!r}, now {job.facts.get(key)!r}"
        for key in sorted({*facts, *job.facts})
        if facts.get(key) != job.facts.get(key)
    ]
    listed = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
    found += [f"{name} differs" for name in sorted({*listed, *hashes}) if listed.get(name) != hashes.get(name)]
    return [f"{manifest_of(output)}: is another one when it is made again: {'; '.join(found)}"] if found else []


def _report(target: Path, walk: Verification, made_again: str) -> int:
    """Print mismatches, licences and the summary. Returns the exit status."""
    from llmfusion.study.kinds import is_source

    mismatches = list(dict.fromkeys(walk.mismatches))
    for line in mismatches:
        print(f"mismatch: {line}", file=sys.stderr)
    sources = {address: artifact for address, artifact in walk.artifacts.items() if is_source(address)}
    for address, artifact in sorted(sources.items()):
        print(f"{address}  {artifact.sha256[:16]}  licence: {_licence(address, artifact)}")
    counts = f"{len(walk.artifacts)} artifacts, {walk.bytes_hashed / 1e6:,.1f} MB hashed"
    verdict = f"{len(mismatches)} MISMATCHES" if mismatches else "all match"
    print(f"{target}: {counts}, {made_again}{len(sources)} datasets, task sets and base models: {verdict}")
    return int(bool(mismatches))


def _licence(address: str, artifact: Artifact) -> str:
    """The licence that a source states, or the licences behind a base model that was trained here."""
    from llmfusion.artifacts.licences import licences_of

    try:
        return ", ".join(sorted(set(licences_of(address, artifact).values())))
    except UserError:
        return "NOT DECLARED"
