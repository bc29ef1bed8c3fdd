"""A capture in chunks and shards: the same bytes however many jobs made it, and however often they were killed."""

import errno
import json
import logging
import os

import pytest

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.steps import capture_shard, capture_teacher
from llmfusion.study.kinds.capture_teacher import Spec
from llmfusion.teachers import capture as capture_module
from llmfusion.teachers.cache_format import CHUNK_SAMPLES, chunk_file_name
from tests.unit.stand_ins import artifact, job

SPEC = {"step": "capture", "recipe": 2, "model": "base/t", "mix": "m", "capture": {"dtype": "float32", "batch_size": 3}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 4)  # 29 samples: 8 chunks, the last of one sample


@pytest.fixture
def made_from(teacher, mix):
    return {"models/base/t": teacher, "data/mix/m": mix}


@pytest.fixture
def whole(tmp_path, made_from):
    """The cache as one job makes it that nobody disturbs."""
    return run(tmp_path, "whole", made_from)


def run(tmp_path, name, inputs, **changed):
    made = job(tmp_path, {**SPEC, **changed}, inputs, name)
    build(made)
    return made


def build(made):
    """What the rule of the spec calls."""
    (capture_shard if "shard" in json.loads(made.spec) else capture_teacher).build(made)


def files(made):
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def sharded(tmp_path, made_from, count):
    """Each shard by a job of its own, to be assembled by another."""
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
    assembled = run(tmp_path, "assembled", {**made_from, **shards})
    assert files(assembled) == files(whole)
    assert assembled.facts == whole.facts
    for number in range(8):  # without taking room twice
        assert (assembled.folder / chunk_file_name(number)).stat().st_nlink >= 2


def test_shards_share_the_chunks_and_the_first_one_has_the_head(tmp_path, made_from):
    shards = sharded(tmp_path, made_from, 3)
    stored = [sorted(p.name for p in shard.folder.glob("*.safetensors")) for shard in shards.values()]
    chunks = [[name for name in names if name.startswith("piece")] for names in stored]
    assert chunks == [[chunk_file_name(n) for n in range(i, 8, 3)] for i in range(3)]
    assert ["head.safetensors" in names for names in stored] == [True, False, False]


class KilledError(Exception):
    pass


def kill_after(count, monkeypatch):
    """The job dies while it works on chunk number ``count``. Returns a list with an entry for each finished chunk."""
    capture_chunk = capture_module._LoadedTeacher.capture_chunk
    done = []

    def interrupted(self, *arguments):
        if len(done) == count:
            raise KilledError
        done.append(1)
        return capture_chunk(self, *arguments)

    monkeypatch.setattr(capture_module._LoadedTeacher, "capture_chunk", interrupted)
    return done


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_a_capture_that_is_killed_goes_on_at_the_next_chunk_to_the_same_bytes(
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


def test_a_capture_killed_after_its_last_chunk_needs_no_teacher_again(tmp_path, made_from, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "assemble", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            run(tmp_path, "killed", made_from)
    monkeypatch.setattr(capture_module, "load_model", lambda *_: pytest.fail("the teacher was loaded"))
    assert files(run(tmp_path, "killed", made_from)) == files(whole)


def spoil_chunk(folder):
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


@pytest.mark.parametrize("spoil", [spoil_chunk, without_note, without_rows, half_a_note])
def test_a_damaged_chunk_of_an_interrupted_capture_is_made_again(
    tmp_path, made_from, whole, monkeypatch, caplog, spoil
):
    with monkeypatch.context() as patch:
        kill_after(5, patch)
        with pytest.raises(KilledError):
            run(tmp_path, "killed", made_from)
    finished = tmp_path / "killed/work/pieces"
    spoil(finished)
    (finished / ".piece-00006.safetensors.77.tmp").write_bytes(b"half")
    done = kill_after(99, monkeypatch)
    assert files(run(tmp_path, "killed", made_from)) == files(whole)
    assert len(done) == 4
    assert "piece-00002.safetensors" in caplog.text
    assert not list(finished.glob(".*.tmp"))


def test_chunks_of_another_spec_or_other_inputs_are_not_taken(tmp_path, made_from, whole, monkeypatch, caplog):
    made = job(tmp_path, SPEC, made_from, "moved", key="old")
    build(made)
    for path in made.folder.iterdir():
        path.unlink()
    done = kill_after(99, monkeypatch)
    again = job(tmp_path, SPEC, made_from, "moved", key="new")
    build(again)
    assert len(done) == 8
    assert "of another spec or other inputs, and removed" in caplog.text
    assert files(again) == files(whole)


@pytest.mark.parametrize("shard", [{}, {"shard": [1, 2]}])
def test_what_a_killed_capture_of_a_longer_mix_left_is_removed_before_the_work(
    tmp_path, made_from, monkeypatch, caplog, shard
):
    with monkeypatch.context() as patch:
        patch.setitem(CHUNK_SAMPLES, "hidden", 1)
        kill_after(13, patch)
        with pytest.raises(KilledError):
            run(tmp_path, "one", made_from, **shard)
    (tmp_path / "one/work/pieces/piece-00028.safetensors").write_bytes(b"without a note")
    spec = {**SPEC, **shard}
    again = job(tmp_path, spec, made_from, "one", key="another")
    undisturbed = job(tmp_path, spec, made_from, "undisturbed", key="another")
    build(again)
    build(undisturbed)
    assert files(again) == files(undisturbed)
    names = "head.json, head.safetensors, piece-00000.json and "
    assert f"not finished, or of another spec or other inputs, and removed: {names}" in caplog.text


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


def test_samples_that_do_not_fit_are_counted_once_over_all_shards(tmp_path, made_from, teacher, mix, samples):
    short = {**made_from, "data/mix/m": artifact(mix.folder, max_length=40, samples=len(samples))}
    one = run(tmp_path, "one", short)
    two = run(tmp_path, "two", {**short, **sharded(tmp_path, short, 2)})
    assert one.facts == two.facts
    assert one.facts["rejected"]["too long"]["count"] + one.facts["samples"] == len(samples)
    assert files(one) == files(two)


def test_the_step_captures_the_model_and_mix_of_its_spec(tmp_path, made_from, cache, monkeypatch):
    monkeypatch.setitem(CHUNK_SAMPLES, "hidden", 128)
    made = run(tmp_path, "whole", made_from, capture={"dtype": "float32", "batch_size": 7})
    assert made.facts == cache.facts


def test_what_a_capture_is_said_to_need_is_no_more_than_what_it_writes(teacher, mix, cache):
    written = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    spec = Spec.model_validate({**SPEC, "capture": {"dtype": "float32"}})
    assert 0.6 * written < capture_teacher.least_bytes(teacher, mix, spec) <= written


def test_what_a_killed_writer_left_half_written_makes_room_before_the_disk_is_looked_at(
    tmp_path, made_from, monkeypatch
):
    made = job(tmp_path, SPEC, made_from, "full")
    half = made.work / "pieces/.piece-00000.safetensors.77.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")

    def full(*_):
        assert not half.exists()
        raise UserError("no room")

    monkeypatch.setattr(type(made), "require_disk", full)
    with pytest.raises(UserError, match="no room"):
        build(made)
