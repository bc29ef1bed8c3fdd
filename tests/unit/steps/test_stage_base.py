import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfusion.errors import UserError
from llmfusion.models.loading import load_model
from llmfusion.steps.stage_base import build
from tests.unit.stand_ins import ARCHITECTURE, STAND_IN, artifact, job

LICENSED = {"license": "mit", "vocabulary": "v"}
RUN = {"kind": "scratch", "mix": "m", "steps": 3, "batch_size": 4, "lr": 1e-3, "save_dtype": "float32"}


def test_a_base_model_is_trained_here_or_from_another(tmp_path, mix, pivot):
    inputs = {"data/mix/m": mix, "models/base/pivot": pivot}
    made = job(tmp_path, {"base": {**RUN, "tokenizer": {"vocabulary_size": 300}, "architecture": ARCHITECTURE}}, inputs)
    build(made)
    facts = made.facts
    assert (facts["steps"], facts["license"], facts["vocabulary_size"]) == (3, STAND_IN, 300)
    frozen = {**RUN, "init": "base/pivot", "lr": 1e-30, "weight_decay": 0.0}
    again = job(tmp_path, {"base": frozen}, inputs, "again")
    build(again)
    before = load_model(pivot, "float32").state_dict()
    after = load_model(artifact(again.folder), "float32").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_of_a_model_from_another_disk_needs_its_room_and_a_link_none(tmp_path, pivot, monkeypatch):
    source = shutil.copytree(pivot.folder, tmp_path / "elsewhere")
    spec = {"base": {"kind": "path", "path": str(source), "license": "mit", "vocabulary": "v"}}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    build(job(tmp_path, spec, name="linked"))
    stat = Path.stat

    def on_another_disk(path, **options):
        status = stat(path, **options)
        if path.suffix != ".safetensors":
            return status
        return os.stat_result((status.st_mode, status.st_ino, -1, *tuple(status)[3:]))

    monkeypatch.setattr(Path, "stat", on_another_disk)
    with pytest.raises(UserError, match=r"a copy of .*elsewhere needs \d+ KiB, 0 KiB are free"):
        build(job(tmp_path, spec, name="copied"))


@pytest.mark.parametrize("across", [False, True], ids=["linked", "copied"])
def test_a_private_file_of_a_model_is_published_to_nobody_else(tmp_path, pivot, monkeypatch, across):
    source = shutil.copytree(pivot.folder, tmp_path / "source")
    for path in source.iterdir():
        path.chmod(0o644)
    (source / "chat_template.jinja").chmod(0o600)
    if across:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "another file system")))
    made = job(tmp_path, {"base": {"kind": "path", "path": str(source), "license": "mit", "vocabulary": "v"}})
    build(made)
    assert made.rights == 0o700
    assert (made.folder / "chat_template.jinja").stat().st_mode & 0o777 == 0o600
    assert (made.folder / "config.json").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], object]], str]:
    """Calls something as a user without rights and returns what it was told."""
    before = os.geteuid()

    def call(action: Callable[[], object]) -> str:
        os.seteuid(65534)
        try:
            with pytest.raises(UserError) as refused:
                action()
        finally:
            os.seteuid(before)
        return str(refused.value)

    return call


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not read")
@pytest.mark.parametrize("locked", [".", "model", "model/config.json", "model/model.safetensors"])
def test_what_cannot_be_read_is_told_with_its_name(pivot, as_nobody, locked):
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(pivot.folder, place / "model")
    (place / "model").chmod(0o755)
    for path in (place / "model").iterdir():
        path.chmod(0o644)
    place.chmod(0o755)
    (place / locked).chmod(0o000)
    made = job(Path(tempfile.mkdtemp()), {"base": {**LICENSED, "kind": "path", "path": str(place / "model")}})
    for folder in (made.folder.parent.parent, made.folder.parent, made.folder, made.work):
        folder.chmod(0o755)
    os.chown(made.folder, 65534, 65534)
    os.chown(made.work, 65534, 65534)
    told = as_nobody(lambda: build(made))
    shutil.rmtree(place)
    shutil.rmtree(made.folder.parent.parent)
    assert told.startswith(str(place / ("model" if locked == "." else locked)))
    assert "Permission denied" in told
    assert len(told.splitlines()) == 1
