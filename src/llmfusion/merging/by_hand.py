"""A merge outside a study: a draft that is renamed to its place, with a manifest of its own."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from llmfusion.artifacts.lease import Lease
from llmfusion.errors import UserError, require
from llmfusion.io.files import common_rights, format_bytes, model_file, sha256_file
from llmfusion.merging import engine
from llmfusion.merging.plan import MergePlan
from llmfusion.merging.report import in_force, write_card


def merge_folders(
    plan: MergePlan, out: Path, threads: int | None = None, progress: engine.Progress | None = None
) -> dict[str, Any]:
    """Merge into a draft beside ``out``, then rename. Returns facts of the merge.

    What is refused leaves nothing; a process that is killed leaves what it has finished, and the same call goes on from
    there. Raises :class:`UserError` where ``out`` exists, the disk is too full, or values are not finite.
    """
    out = Path(os.path.realpath(out))  # unlike Path.resolve() also through a link to itself
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.draft"
    with Lease(out.parent / f".{out.name}.lease") as lease:
        require(not out.exists(), f"{out}: exists already; another process has just made it")
        _require_disk(plan, draft)
        try:
            facts = _write_draft(plan, draft, threads, progress)
        except (UserError, OSError):
            shutil.rmtree(draft, ignore_errors=True)
            raise
        lease.check()  # outside the try: the draft may be another writer's now
        os.rename(draft, out)
    return facts


def _write_draft(plan: MergePlan, draft: Path, threads: int | None, progress: engine.Progress | None) -> dict[str, Any]:
    """The merge with its card and manifest; returns facts."""
    pivot = plan.matching.pivot.folder
    models = [str(model.folder) for model in plan.matching.models]
    facts, checksums = engine.run(plan, draft, plan.identity(), threads, progress)
    write_card(draft, plan.options, str(pivot), models, facts, ["- those of the pivot and of every model above"])
    manifest = _manifest(plan, draft, facts, checksums)
    (draft / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    rights = common_rights(draft.iterdir())  # the engine gave them no more than the sources have
    draft.chmod(0o755 & (rights | rights >> 2) | 0o700)  # who may read the files may enter
    return facts


def _require_disk(plan: MergePlan, draft: Path) -> None:
    """Raise :class:`UserError` where the rest of the merge does not fit on the disk."""
    needed = plan.bytes_written - sum(path.stat().st_size for path in draft.glob("*.safetensors"))
    free = shutil.disk_usage(draft.parent).free
    require(
        needed <= free,
        f"the merge needs {format_bytes(needed)} more, {format_bytes(free)} are free in {draft.parent}: "
        "free some, or take another --out",
    )


def _manifest(plan: MergePlan, folder: Path, facts: dict[str, Any], checksums: dict[str, str]) -> dict[str, Any]:
    """What the folder was made from and holds: sha256 of all files but the weights, whose tensors have an XXH3 checksum
    each.

    Inputs are described by their own manifest's sha256 where they have one, and by sizes and the sha256 of their
    headers.
    """
    weights = {
        name: {"size": layout.size, "xxh3": {tensor: checksums[tensor] for tensor in layout.tensors}}
        for name, layout in plan.files.items()
    }
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in weights)
    files: dict[str, Any] = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in others
    }
    pivot_files = {tensor.pivot.file for tensor in plan.tensors}
    return {
        "made_by": "llmfusion merge",
        "method": plan.options.method,
        "options": in_force(plan.options),
        "pivot": _describe_input(plan.matching.pivot.folder, pivot_files),
        "models": [
            _describe_input(model.folder, {info.file for info in model.tensors.values()})
            for model in plan.matching.models
        ],
        "files": files | weights,
        "facts": facts,
    }


def _describe_input(folder: Path, files: set[Path]) -> dict[str, Any]:
    """A checkpoint that was merged: its own manifest if it has one, and the headers of its files."""
    manifest = folder / "manifest.json"
    headers = {
        file.name: {"size": file.stat().st_size, "header_sha256": _header_sha256(file)} for file in sorted(files)
    }
    has_manifest = os.path.lexists(manifest)
    own = {"manifest_sha256": sha256_file(model_file(folder, manifest.name))} if has_manifest else {}
    return {"folder": str(folder), **own, "files": headers}


def _header_sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.sha256(handle.read(int.from_bytes(handle.read(8), "little"))).hexdigest()
