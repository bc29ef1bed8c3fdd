import pytest

from llmfusion.data.samples import read_samples
from llmfusion.errors import UserError
from llmfusion.steps.generate_answers import build
from tests.unit.stand_ins import artifact, job
from tests.unit.teachers.test_generation import source  # noqa: F401 - a fixture


def test_the_step_answers_the_questions_of_a_mix_and_counts(tmp_path, source, mix, samples):  # noqa: F811
    spec = {"model": "base/source", "mix": "m", "generation": {"dtype": "float32", "batch_size": 8}}
    made = job(tmp_path, spec, {"models/base/source": source, "data/mix/m": mix})
    build(made)
    kept = list(read_samples(made.folder / "samples.jsonl"))
    assert (made.facts["samples"], made.facts["asked"], made.facts["max_length"]) == (len(kept), len(samples) - 1, 128)
    assert len(kept) + sum(r["count"] for r in made.facts["rejected"].values()) == len(samples) - 1


def test_a_mix_without_questions_and_a_model_without_answers_are_refused(tmp_path, pivot, mix):
    spec = {"model": "base/p", "mix": "m", "generation": {"dtype": "float32"}}
    (tmp_path / "samples.jsonl").write_text('{"id": "1", "text": "raw"}\n')
    raw = artifact(tmp_path, max_length=40)
    with pytest.raises(UserError, match="raw text only"):
        build(job(tmp_path, spec, {"models/base/p": pivot, "data/mix/m": raw}, "a"))
    short = artifact(mix.folder, max_length=2)
    with pytest.raises(UserError, match=r"base/p gave no usable answer to \d+ prompts: .*too long"):
        build(job(tmp_path, spec, {"models/base/p": pivot, "data/mix/m": short}, "b"))
