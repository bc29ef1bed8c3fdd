"""The training loop as a library: a model, a tokenizer, samples on disk; no job, no step, no Snakemake."""

import subprocess
import sys

import torch

from llmfusion.artifacts.store import Artifact
from llmfusion.fusion.teacher import load_teacher
from llmfusion.models.loading import load_tokenizer
from llmfusion.study.schema.training import TrainedModel, Training
from llmfusion.training.loop import Student, train

OPTIONS = {"mix": "any", "steps": 8, "batch_size": 4, "lr": 1e-2}


def tiny_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_a_model_is_fine_tuned_and_saved_with_a_temporary_folder_alone(tmp_path, tokenizer, mix):
    student = Student(tiny_model(tokenizer), tokenizer)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    started = []
    result = train(
        student, Training(**OPTIONS), None, [mix], [], tmp_path / "state", "key", on_start=lambda: started.append(True)
    )
    assert started == [True]
    assert result.facts["steps"] == 8
    assert result.records[-1]["loss"] < result.records[0]["loss"]
    assert all(not torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    out = tmp_path / "checkpoint"
    facts = student.save(out, "float32")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert load_tokenizer(out, None).get_vocab() == tokenizer.get_vocab()


def test_a_cached_teacher_is_fused_into_a_model_of_ones_own(tmp_path, tokenizer, mix, cache):
    assert isinstance(cache, Artifact)
    options = {"init": "base/any", "teachers": ["base/one"], "fusion": {"target": "kd"}, **OPTIONS}
    run = TrainedModel.model_validate(options)
    student = Student(tiny_model(tokenizer), tokenizer)
    teacher = load_teacher("base/one", cache, tokenizer, len(tokenizer), "cpu", run.fusion)
    result = train(student, run, run.fusion, [mix], [teacher], tmp_path / "state", "key")
    assert result.records[-1]["fusion"] < result.records[0]["fusion"]


def test_the_loop_imports_neither_jobs_nor_steps_nor_snakemake():
    code = "import sys, llmfusion.training.loop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "llmfusion.training.loop" in modules
    assert not {"llmfusion.artifacts.job", "llmfusion.steps", "llmfusion.cli", "snakemake"} & modules
