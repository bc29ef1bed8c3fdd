"""What the hub says of a repository before anything is downloaded: files, bytes, licence; and whether they fit here.

Two disks can fill: that of the hub client's cache, which downloads go to, and that of the study. Weights get a second
name from the cache to the study where both are one file system, else a copy.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmfusion.errors import UserError
from llmfusion.io.files import format_bytes
from llmfusion.study.schema.base_models import MODEL_FILES, HubModel
from llmfusion.study.schema.data import HubSource

DATA_FILES = ("*.parquet", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.txt", "*.arrow", "*.gz", "*.zst", "*.zip", "*.xz")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # hold no rows
# snapshot_download takes these of a model repository, and of them only what lies at the top: other folders hold other
# formats, and consolidated*.safetensors the same weights a second time
MODEL_ALLOWED = list(MODEL_FILES)
MODEL_IGNORED = ["*/*", "consolidated*"]
OFFLINE = "Offline, download it elsewhere and use kind: path"
PREPARED = {".parquet": 2.5, ".gz": 5.0, ".zst": 5.0, ".xz": 6.0, ".zip": 5.0}  # bytes of rows a byte of a packed file


@dataclass(frozen=True)
class HubFile:
    """A file that staging takes from a repository."""

    name: str
    bytes: int
    is_cached: bool


@dataclass(frozen=True)
class Repository:
    """A repository at a commit as the hub describes it, with the files that staging takes of it."""

    name: str
    kind: str  # "model" or "dataset"
    license: str
    is_gated: bool
    files: tuple[HubFile, ...]
    parameters: int | None = None  # of a model whose weights are safetensors

    @property
    def size(self) -> int:
        """Bytes of all files that are taken."""
        return sum(file.bytes for file in self.files)

    @property
    def to_download(self) -> int:
        """Bytes of those that are not in the client's cache."""
        return sum(file.bytes for file in self.files if not file.is_cached)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights among them."""
        return sum(file.bytes for file in self.files if file.name.endswith(".safetensors"))


def describe(source: HubModel | HubSource) -> Repository:
    """Ask the hub (``HF_ENDPOINT``) about a repository. Raises :class:`UserError` where it does not answer."""
    from huggingface_hub import HfApi

    kind = "model" if isinstance(source, HubModel) else "dataset"
    try:
        info: Any = HfApi().repo_info(
            source.repo, repo_type=kind, revision=source.revision, files_metadata=True, timeout=20
        )
    except Exception as error:  # of many types, from many layers; the user needs its message and what to do
        raise UserError(failure(source, "the hub does not describe it", error)) from error
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    card = info.card_data.to_dict() if info.card_data else {}
    names = _model_files(sizes) if isinstance(source, HubModel) else _data_files(sizes, source, card)
    files = tuple(HubFile(name, sizes[name], _is_cached(source, kind, name)) for name in names)
    stated = card.get("license") or source.license
    license_name = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    total = getattr(getattr(info, "safetensors", None), "total", None)
    return Repository(source.repo, kind, license_name, bool(info.gated), files, total)


def failure(source: HubModel | HubSource, what: str, error: Exception) -> str:
    """A sentence for what the hub's client raised: what did not work, its reason, and what to look at."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{source.repo} at {source.revision[:12]}: {what}: {reason}. Is this machine online, the licence accepted on "
        "the hub and HF_TOKEN set?"
    )


def _is_cached(source: HubModel | HubSource, kind: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source.repo, name, revision=source.revision, repo_type=kind), str)


def _model_files(names: Mapping[str, int]) -> list[str]:
    from huggingface_hub.utils import filter_repo_objects

    return sorted(filter_repo_objects(names, allow_patterns=MODEL_ALLOWED, ignore_patterns=MODEL_IGNORED))


def _data_files(names: Mapping[str, int], source: HubSource, card: Mapping[str, Any]) -> list[str]:
    """Files that ``datasets`` reads: those of the key ``files``, else those of the subsets and the split in the
    repository's card, else those whose path names the split, else everything that holds rows."""
    patterns = _as_list(source.files) or list(_patterns_of_card(source, card))
    if patterns:
        return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))
    rows = [name for name in names if any(fnmatch(name, pattern) for pattern in DATA_FILES)]
    rows = sorted(name for name in rows if Path(name).name not in DESCRIPTIONS)
    return [name for name in rows if _names_split(name, source)] or rows


def _names_split(path: str, source: HubSource) -> bool:
    return bool(set(source.split_names) & set(re.split(r"[/.\-]", path)))


def _as_list(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []


def _patterns_of_card(source: HubSource, card: Mapping[str, Any]) -> Iterator[str]:
    """Patterns of the files of the subsets that are read, as ``configs`` in a dataset's card gives them."""
    configs = card.get("configs")
    configs = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    names = {one.get("config_name") for one in configs}
    wanted = _as_list(source.subset) or (["default"] if "default" in names else list(names))
    for config in configs:
        if config.get("config_name") in wanted:
            files = config.get("data_files")
            for entry in files if isinstance(files, list) else [files]:
                if not isinstance(entry, dict):
                    yield from _as_list(entry)
                elif entry.get("split") in source.split_names:
                    yield from _as_list(entry.get("path"))


def places(repository: Repository, folder: Path) -> dict[Path, float]:
    """Bytes that staging a repository will write, by place: the client's caches, and a study's ``folder``."""
    import huggingface_hub.constants as hub

    cache = Path(hub.HF_HUB_CACHE)
    wanted: dict[Path, float] = {cache: repository.to_download}
    if repository.kind == "model":
        wanted[folder] = 0 if _device(cache) == _device(folder) else repository.size
        return wanted
    from datasets import config

    rows = sum(file.bytes * PREPARED.get(Path(file.name).suffix, 1.0) for file in repository.files)
    prepared = Path(config.HF_DATASETS_CACHE)  # what `datasets` makes of the files that were downloaded
    for place in (prepared, folder):
        wanted[place] = wanted.get(place, 0) + rows
    return wanted


def lacking(wanted: Mapping[Path, float]) -> list[str]:
    """A sentence for each disk that cannot hold what is wanted of it."""
    needs: dict[int, float] = {}
    where: dict[int, Path] = {}
    for place, size in wanted.items():
        needs[_device(place)] = needs.get(_device(place), 0) + size
        where.setdefault(_device(place), _existing(place))
    free = {device: shutil.disk_usage(place).free for device, place in where.items()}
    return [
        f"{format_bytes(needs[device])} are needed, {format_bytes(free[device])} are free in {where[device]}"
        for device in needs
        if needs[device] > free[device]
    ]


def require_room(source: HubModel | HubSource, folder: Path) -> None:
    """Ask the hub what staging will download, before the first byte.

    Raises :class:`UserError` where a disk cannot hold it. Where the hub does not answer nothing is checked: what is in
    the cache can be staged all the same, and else the download says why not.
    """
    try:
        repository = describe(source)
    except UserError:
        return
    if missing := lacking(places(repository, folder)):
        advice = "free some, or set HF_HOME (the hub's cache) or the study's `directory` to a larger place"
        raise UserError(f"{source.repo}: {'; '.join(missing)}: {advice}. Nothing was downloaded")


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _device(place: Path) -> int:
    return _existing(place).stat().st_dev
