"""Finished artifacts that are to be made again: their manifests are kept until the new ones are there.

Snakemake deletes the declared outputs of a job before it starts it (``-f``, changed settings), and again when it
fails or when the cluster refuses it. The rest of an artifact stays, and so does what was kept here: it is put back
where the study, as it stands, still asks for it. Snakemake's own ``update()`` does not do: a job that was never
submitted has no backup, the processes of Snakemake within a SLURM job share one, and a failed job is recorded as if
it had made what lies there.
"""

import logging
import os
import shutil
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmfusion.artifacts.lease import is_held
from llmfusion.artifacts.store import drafts_of, remove
from llmfusion.io.files import json_object_or_empty, replacing, sha256_file
from llmfusion.study.addresses import manifest_of, output_of, provenance_of
from llmfusion.study.graph import ArtifactGraph, PlannedArtifact

KEPT = Path("work/kept")
RECORDS = "records"  # of Snakemake, how the outputs were made
LOCKS = Path(".snakemake/locks")
logger = logging.getLogger(__name__)


def keep_outputs(workflow: Any, graph: ArtifactGraph) -> None:
    """Keep what Snakemake's jobs are about to delete; called before the first of them, by the main process.

    Raises ``SystemExit`` with a message for the user where nothing can be kept, before anything is deleted.
    """
    if workflow.is_main_process:
        addresses = {output_of(address): address for address in graph.artifacts}
        planned = (addresses.get(str(file)) for job in workflow.dag.needrun_jobs() for file in job.output)
        try:
            keep(sorted({address for address in planned if address is not None}))
        except OSError as error:
            place = error.filename2 or error.filename or KEPT
            raise SystemExit(
                f"{place}: cannot be written ({error.strerror}): no copy of what is to be made again can be kept, "
                "and a job that fails would lose it; nothing was started"
            ) from None


def put_back_outputs(workflow: Any, graph: ArtifactGraph) -> None:
    """Put back what the jobs of a run did not make; called after the last of them, by the main process."""
    if workflow.is_main_process:
        put_back(graph.artifacts)


def put_back_after_a_kill(workflow: Any, graph: ArtifactGraph) -> None:
    """Put back what the jobs of a killed run did not make, unless a Snakemake works here, which will do it itself."""
    if workflow.is_main_process and KEPT.is_dir() and not (LOCKS.is_dir() and any(LOCKS.iterdir())):
        put_back(graph.artifacts)


def keep(addresses: Iterable[str]) -> None:
    """Keep copies of the declared outputs of these artifacts, where they are all there."""
    for address in addresses:
        output = Path(output_of(address))
        if not all(path.is_file() for path in _outputs(output)):
            continue
        folder = KEPT / address
        passing = folder.with_name(f".{folder.name}")
        shutil.rmtree(passing, ignore_errors=True)
        (passing / RECORDS).mkdir(parents=True)
        for path in [*_outputs(output), provenance_of(output)]:
            if path.is_file():
                shutil.copy2(path, passing / path.name)
            if (record := _record(path)).is_file():
                shutil.copy2(record, passing / RECORDS / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(passing, folder)


def put_back(artifacts: Mapping[str, PlannedArtifact]) -> list[str]:
    """Put back what was kept of the study's artifacts and is not there any more, and forget what was made again.

    Nothing is put back that the study would make again, that somebody makes now, or whose other files have changed.
    Returns the outputs that were put back.
    """
    out = []
    for address, planned in artifacts.items() if KEPT.is_dir() else ():
        output = Path(output_of(address))
        try:
            if _put_back(address, output, planned):
                out.append(str(output))
        except OSError as error:
            logger.warning("%s: cannot be put back from %s: %s", output, KEPT / address, error.strerror)
    if out:
        logger.warning("put back, because the job that was to make it again did not: %s", ", ".join(out))
    return out


def _put_back(address: str, output: Path, planned: PlannedArtifact) -> bool:
    """Whether an output that was kept was put back; then what killed writers left of its successor is removed."""
    folder = KEPT / address
    drafts = drafts_of(output)  # before the lease is looked at: a writer that comes after it makes others
    if not folder.is_dir() or is_held(Path("work") / address / "lease"):
        return False
    is_lost = not all(path.exists() for path in _outputs(output))
    if is_lost:
        if not _is_wanted(folder, output, planned):
            return False
        _restore(folder, output)
        remove(drafts)
    _forget(folder)
    return is_lost


def _forget(folder: Path) -> None:
    shutil.rmtree(folder)
    for parent in folder.parents:
        if parent == Path("work") or any(parent.iterdir()):
            break
        parent.rmdir()


def _outputs(output: Path) -> list[Path]:
    """The files that a rule declares: a manifest or a score, or the three of a table, the manifest last."""
    return [output] if output.suffix == ".json" else [output, output.with_suffix(".md"), manifest_of(output)]


def _record(output: Path) -> Path:
    """Snakemake's record of how an output was made: its name in base64, in pieces that a file system takes."""
    name = urlsafe_b64encode(str(output).encode()).decode()
    *folders, last = (name[i : i + 254] for i in range(0, len(name), 254))
    return Path(".snakemake/metadata", *(f"@{folder}" for folder in folders), last)


def _is_wanted(folder: Path, output: Path, planned: PlannedArtifact) -> bool:
    """Whether what is kept in ``folder`` is what the study asks for, of the inputs as they are, and still complete."""
    provenance = provenance_of(output)
    kept = folder / manifest_of(output).name
    if not provenance.is_file() or provenance.read_bytes() != (folder / provenance.name).read_bytes():
        return False  # something else has been published meanwhile
    manifest = json_object_or_empty(kept)
    inputs = manifest.get("inputs")
    if manifest.get("spec") != planned.spec or not isinstance(inputs, dict):
        return False
    current = {address: manifest_of(Path(output_of(address))) for address in inputs}
    if any(path.is_file() and sha256_file(path) != inputs[address] for address, path in current.items()):
        return False
    outside = (Path(path) for path in planned.inputs if not path.startswith("results/"))
    return all(not path.exists() or path.stat().st_mtime <= kept.stat().st_mtime for path in outside)


def _restore(folder: Path, output: Path) -> None:
    for path in _outputs(output):
        record = _record(path)
        if (kept := folder / RECORDS / path.name).is_file():
            record.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(kept, record)
        with replacing(path) as temporary:
            shutil.copy2(folder / path.name, temporary)
