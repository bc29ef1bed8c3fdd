"""What will be downloaded, against a hub on loopback: only the files that are taken count, and both disks."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmfusion.cli.main import main
from llmfusion.data import hub as client
from llmfusion.errors import UserError
from llmfusion.models.staging import stage_hub
from llmfusion.study.schema.base_models import HubModel
from llmfusion.study.schema.data import HubSource
from tests.unit.finished_jobs import study_file
from tests.unit.hub_server import REVISION, Hub, serving

GIB = 2**30
MODEL = HubModel(kind="hub", repo="owner/pivot", revision=REVISION, vocabulary="v", license="mit")
FILES: dict[str, bytes | int] = {
    "config.json": b'{"hidden_size": 8}',
    "tokenizer.json": 1000,
    "model-00001-of-00002.safetensors": 3 * GIB,
    "model-00002-of-00002.safetensors": 2 * GIB,
    "model.safetensors.index.json": 500,
    "pytorch_model.bin": 5 * GIB,
    "consolidated.safetensors": 5 * GIB,
    "onnx/model.json": 7 * GIB,
    "original/params.json": 10,
    "modeling_own.py": 10,
    "LICENSE": 11,
}
TAKEN = 5 * GIB + 18 + 1000 + 500 + 11


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model, and a client whose cache is empty."""
    import huggingface_hub.constants

    info = {
        "gated": "manual",
        "cardData": {"license": "llama3.1"},
        "safetensors": {"parameters": {"BF16": 9}, "total": 9},
    }
    with serving(Hub({"models/owner/pivot": dict(FILES)}, {"models/owner/pivot": info})) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", served.url, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url, raising=False)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield served


def dataset(**keys: Any) -> HubSource:
    body = {"kind": "hub", "repo": "owner/rows", "revision": REVISION, "layout": "pair", "license": "mit"}
    return HubSource.model_validate(body | keys)


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_only_the_files_that_are_taken_of_a_model_count(hub: Hub) -> None:
    found = client.describe(MODEL)
    assert found.size == found.to_download == TAKEN
    assert (found.license, found.is_gated, found.parameters) == ("llama3.1", True, 9)
    assert {file.name for file in found.files} == {
        name for name in FILES if "/" not in name and name.endswith((".json", ".safetensors", "LICENSE"))
    } - {"consolidated.safetensors"}


PARTS = {f"data/train-{n}.parquet": 100 for n in range(3)} | {f"data/train_1M-{n}.parquet": 10 for n in range(2)}
CARD = {
    "configs": [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*"},
                {"split": "train_1M", "path": "data/train_1M-*"},
            ],
        },
        {"config_name": "other", "data_files": "extra/*.jsonl"},
    ]
}


@pytest.mark.parametrize(
    ("source", "card", "size"),
    [
        ({"files": "data/train_1M-*.parquet"}, CARD, 20),
        ({"split": "train_1M"}, CARD, 20),
        ({"subset": "default", "split": "train[:10%]+train_1M"}, CARD, 320),
        ({"subset": ["default", "other"]}, CARD, 305),
        ({"split": "train_1M"}, {}, 20),
        ({"split": "validation"}, {}, 325),  # no file says so: all
    ],
)
def test_of_a_dataset_the_files_and_subsets_of_the_study_count(
    hub: Hub, source: dict[str, Any], card: dict[str, Any], size: int
) -> None:
    hub.files["datasets/owner/rows"] = {
        **PARTS,
        "extra/a.jsonl": 5,
        "README.md": 7,
        "script.py": 9,
        "dataset_infos.json": 3,
    }
    hub.info["datasets/owner/rows"] = {"cardData": card}
    found = client.describe(dataset(**source))
    assert found.size == size
    assert found.license == "mit"  # the study's own where the card says nothing


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk(monkeypatch, 4 * GIB)
    with pytest.raises(
        UserError, match=r"owner/pivot: 5,120 MiB are needed, 4,096 MiB are free in .*Nothing was downloaded"
    ):
        stage_hub(MODEL, tmp_path, None)
    assert hub.downloads() == []
    hub.files["datasets/owner/rows"] = {"a.parquet": 2 * GIB}
    with pytest.raises(
        UserError, match="owner/rows: 12 GiB are needed"
    ):  # 2 packed, and twice the rows: cache and study
        client.require_room(dataset(), tmp_path)


def test_weights_are_counted_on_both_disks_where_they_cannot_be_linked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = client.describe(MODEL)
    cache, folder = tmp_path / "cache", tmp_path / "study"
    assert client.places(found, folder) == {cache: TAKEN, folder: 0}
    monkeypatch.setattr(client, "_device", lambda place: 1 if place == cache else 2)
    assert client.places(found, folder) == {cache: TAKEN, folder: TAKEN}


def test_what_is_in_the_cache_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("owner/pivot", "config.json", revision=REVISION, endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert client.describe(MODEL).to_download == TAKEN - len(FILES["config.json"])  # type: ignore[arg-type]


def study_of_hub(folder: Path) -> Path:
    def change(data: dict[str, Any]) -> None:
        entry = {"kind": "hub", "repo": "owner/pivot", "revision": REVISION, "vocabulary": "v", "license": "mit"}
        data["models"]["base"]["pivot"] = entry
        data["models"]["base"] |= {name: dict(entry, repo="owner/nowhere") for name in ("code", "math")}

    return study_file(folder, change=change)


def test_an_estimate_lists_what_will_be_downloaded_and_takes_the_sizes_from_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_of_hub(tmp_path)
    assert main(["estimate", str(file)]) == 0
    assert "size unknown: base/pivot: owner/pivot is not downloaded yet" in capsys.readouterr().out
    assert hub.requests == []  # nothing is asked that was not to be
    assert main(["estimate", str(file), "--staging"]) == 1  # owner/nowhere is not there
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("owner/pivot"))
    assert line.split() == ["owner/pivot", "model", "6", "5,120", "MiB", "5,120", "MiB", "gated", "llama3.1"]
    assert "to download: 5,120 MiB" in out
    assert out.count("error: owner/nowhere at 0123456789ab: the hub does not describe it: ") == 1
    assert "size unknown: base/pivot" not in out
    assert "size unknown: base/code" in out
    disk(monkeypatch, 4 * GIB)
    assert main(["estimate", str(file), "models/base/pivot", "--staging"]) == 1
    assert "staging: 5,120 MiB are needed, 4,096 MiB are free in " in capsys.readouterr().err
    assert hub.downloads() == []


def test_without_a_network_the_estimate_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["estimate", str(study_of_hub(tmp_path)), "models/base/pivot", "--staging"]) == 1
    out = capsys.readouterr().out
    assert "error: owner/pivot at 0123456789ab: the hub does not describe it: " in out
    assert "Is this machine online" in out
    assert "Traceback" not in out
