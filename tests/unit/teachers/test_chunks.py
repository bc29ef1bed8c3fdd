"""A capture in pieces and shards: the same bytes however many jobs made it, and however often they were killed."""

import errno
import json
import os

import pytest
import torch

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.io.files import sha256_file
from llmfusion.steps import capture_teacher as step_module
from llmfusion.teachers import capture as module
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, chunk_file_name
from llmfusion.teachers.chunks import Shard, Store, gather
from tests.unit.stand_ins import artifact, job

SPEC = {"step": "capture", "model": "base/t", "mix": "m", "capture": {"dtype": "float32", "batch_size": 3}}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 4)  # 29 samples: 8 pieces, the last of one sample


@pytest.fixture
def made_from(teacher, mix):
    return {"models/base/t": teacher, "data/mix/m": mix}


@pytest.fixture
def whole(tmp_path, made_from):
    """The cache as one job makes it that nobody disturbs."""
    return run(tmp_path, "whole", made_from)


def run(tmp_path, name, inputs, **changed):
    made = job(tmp_path, {**SPEC, **changed}, inputs, name)
    step_module.build(made)
    return made


def files(made):
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def sharded(tmp_path, made_from, count):
    """Each shard by a job of its own, gathered by another."""
    shards = {}
    for i in range(1, count + 1):
        done = run(tmp_path, f"{i}-of-{count}", made_from, shard=[i, count])
        manifest = {
            "spec": json.dumps({**SPEC, "shard": [i, count]}),
            "inputs": {a: x.sha256 for a, x in made_from.items()},
        }
        shards[f"teachers/shards/base/t/m/{i}-of-{count}"] = Artifact(
            done.folder, {**artifact(done.folder).manifest, **manifest}, "1" * 64
        )
    return shards


@pytest.mark.parametrize("count", [2, 3, 8, 11])
def test_a_cache_is_the_same_byte_for_byte_whatever_the_number_of_shards(tmp_path, made_from, whole, count):
    shards = sharded(tmp_path, made_from, count)
    gathered = run(tmp_path, "gathered", {**made_from, **shards})
    assert files(gathered) == files(whole)
    assert gathered.facts == whole.facts
    for number in range(8):  # without taking room twice
        assert (gathered.folder / chunk_file_name(number)).stat().st_nlink >= 2


def test_shards_share_the_pieces_and_the_first_one_has_the_head(tmp_path, made_from):
    shards = sharded(tmp_path, made_from, 3)
    there = [sorted(p.name for p in shard.folder.glob("*.safetensors")) for shard in shards.values()]
    assert [[name for name in names if name.startswith("piece")] for names in there] == [
        [chunk_file_name(n) for n in range(i, 8, 3)] for i in range(3)
    ]
    assert ["head.safetensors" in names for names in there] == [True, False, False]


class KilledError(Exception):
    pass


def kill_after(count, monkeypatch):
    """The job dies while it works on piece number ``count``."""
    read = module._Reader.piece
    done = []

    def piece(self, *words):
        if len(done) == count:
            raise KilledError
        done.append(1)
        return read(self, *words)

    monkeypatch.setattr(module._Reader, "piece", piece)
    return done


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_a_capture_that_is_killed_goes_on_at_the_next_piece_to_the_same_bytes(
    tmp_path, made_from, whole, monkeypatch, count
):
    with monkeypatch.context() as patch:
        kill_after(count, patch)
        with pytest.raises(KilledError):
            run(tmp_path, "killed", made_from)
    assert list((tmp_path / "killed/out").iterdir()) == []
    done = kill_after(99, monkeypatch)
    assert files(run(tmp_path, "killed", made_from)) == files(whole)
    assert len(done) == 8 - count


def test_a_capture_killed_after_its_last_piece_needs_no_teacher_again(tmp_path, made_from, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "join", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            run(tmp_path, "killed", made_from)
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the teacher was loaded"))
    assert files(run(tmp_path, "killed", made_from)) == files(whole)


def spoil_piece(folder):
    path = folder / chunk_file_name(2)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def without_note(folder):
    (folder / "piece-00002.json").unlink()


def without_rows(folder):
    (folder / chunk_file_name(2)).unlink()


def half_a_note(folder):
    note = folder / "piece-00002.json"
    note.write_bytes(note.read_bytes()[:50])


@pytest.mark.parametrize("spoil", [spoil_piece, without_note, without_rows, half_a_note])
def test_a_damaged_piece_of_an_interrupted_capture_is_made_again(
    tmp_path, made_from, whole, monkeypatch, capsys, spoil
):
    with monkeypatch.context() as patch:
        kill_after(5, patch)
        with pytest.raises(KilledError):
            run(tmp_path, "killed", made_from)
    store = tmp_path / "killed/work/pieces"
    spoil(store)
    (store / ".piece-00006.safetensors.77.tmp").write_bytes(b"half")
    done = kill_after(99, monkeypatch)
    assert files(run(tmp_path, "killed", made_from)) == files(whole)
    assert len(done) == 4
    assert "piece-00002.safetensors" in capsys.readouterr().out
    assert not list(store.glob(".*.tmp"))


def test_pieces_of_another_spec_or_other_inputs_are_not_taken(tmp_path, made_from, whole, monkeypatch, capsys):
    made = job(tmp_path, SPEC, made_from, "moved", key="old")
    step_module.build(made)
    for path in made.folder.iterdir():
        path.unlink()
    done = kill_after(99, monkeypatch)
    again = job(tmp_path, SPEC, made_from, "moved", key="new")
    step_module.build(again)
    assert len(done) == 8
    assert "of another spec or other inputs, and removed" in capsys.readouterr().out
    assert files(again) == files(whole)


@pytest.mark.parametrize("shard", [{}, {"shard": [1, 2]}])
def test_what_a_killed_capture_of_a_longer_mix_left_is_removed_before_the_work(
    tmp_path, made_from, monkeypatch, capsys, shard
):
    with monkeypatch.context() as patch:
        patch.setitem(CHUNK_SAMPLES, "hidden", 1)
        kill_after(13, patch)
        with pytest.raises(KilledError):
            run(tmp_path, "one", made_from, **shard)
    (tmp_path / "one/work/pieces/piece-00028.safetensors").write_bytes(b"without a note")
    again, undisturbed = (
        job(tmp_path, {**SPEC, **shard}, made_from, name, key="another") for name in ("one", "undisturbed")
    )
    for made in (again, undisturbed):
        step_module.build(made)
    assert files(again) == files(undisturbed)
    assert (
        "not finished, or of another spec or other inputs, and removed: head.json, head.safetensors, piece-00000.json and "
        in capsys.readouterr().out
    )


def test_where_no_links_are_possible_files_are_copied(tmp_path, made_from, whole, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert files(run(tmp_path, "copied", made_from)) == files(whole)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "full", made_from)


def test_a_shard_of_other_settings_or_another_teacher_is_refused(tmp_path, made_from, tied_teacher):
    shards = sharded(tmp_path, made_from, 2)
    first, second = shards
    other = {**shards[second].manifest, "spec": json.dumps({**SPEC, "capture": {"dtype": "bfloat16"}, "shard": [2, 2]})}
    with pytest.raises(UserError, match=r"2-of-2/out: was made from other settings or inputs than this cache"):
        run(
            tmp_path, "a", {**made_from, first: shards[first], second: Artifact(shards[second].folder, other, "1" * 64)}
        )
    moved = Artifact(tied_teacher.folder, tied_teacher.manifest, "2" * 64)
    with pytest.raises(UserError, match=r"1-of-2/out: was made from other settings or inputs than this cache"):
        run(tmp_path, "b", {**made_from, "models/base/t": moved, **shards})


def test_a_piece_that_is_missing_or_there_twice_is_named(tmp_path, made_from):
    shards = sharded(tmp_path, made_from, 2)
    first, second = (shard.folder for shard in shards.values())
    cases = (
        ([first], "4 of 8 pieces are missing, the first is number 1; make its shard again"),
        ([first, first], "a piece too many: 8 were expected, each once"),
        ([second, first], "head.safetensors lies in 0 folders"),
    )
    for number, (folders, told) in enumerate(cases):
        out = tmp_path / f"gathered-{number}"
        out.mkdir()
        if "head" in told:
            (first / "head.safetensors").unlink()
        with pytest.raises(UserError, match=told):
            gather(folders, out, 29, "hidden")


def test_every_piece_belongs_to_exactly_one_shard():
    for samples in (1, 3, 4, 5, 29, 400):
        for count in (1, 2, 7, 50):
            numbers = [n for i in range(count) for n in Shard.of({"shard": [i + 1, count]}).pieces(samples, "hidden")]
            assert sorted(numbers) == list(range(-(-samples // 4)))
    assert Shard.of({}) == Shard(0, 1)


def test_a_note_is_written_last_and_says_what_was_written(tmp_path):
    store = Store(tmp_path, "key")
    store.put("piece-00000.safetensors", {"x": torch.arange(3)}, {"more": 1})
    told = json.loads((tmp_path / "piece-00000.json").read_bytes())
    assert told == {"key": "key", "sha256": sha256_file(tmp_path / "piece-00000.safetensors"), "more": 1}
    assert store.has("piece-00000.safetensors")
    assert (tmp_path / "piece-00000.safetensors").stat().st_mode & 0o777 == 0o644
    other = Store(tmp_path, "other")
    assert not other.has("piece-00000.safetensors")
    assert (other.size(), store.size()) == (0, sum(path.stat().st_size for path in tmp_path.iterdir()))
    other.tidy()
    assert list(tmp_path.iterdir()) == []


def test_samples_that_do_not_fit_are_counted_once_over_all_shards(tmp_path, made_from, teacher, mix, samples):
    short = {**made_from, "data/mix/m": artifact(mix.folder, max_length=40, samples=len(samples))}
    one = run(tmp_path, "one", short)
    two = run(tmp_path, "two", {**short, **sharded(tmp_path, short, 2)})
    assert one.facts == two.facts
    assert one.facts["rejected"]["too long"]["count"] + one.facts["samples"] == len(samples)
    assert files(one) == files(two)
