"""Sizes of models against published ones, real headers, and names as the hub has them."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llmfusion.study.graph import build_graph
from llmfusion.study.schema.base_models import HubModel, PathModel
from llmfusion.study.sizes import (
    ModelSize,
    rows_of,
    size_of_base,
    size_of_config,
    size_of_folder,
    size_of_gguf,
    size_of_name,
)
from tests.unit.finished_jobs import study_file, workload
from tests.unit.mini_study import small_study

LICENSED: dict[str, Any] = {"vocabulary": "v", "license": "mit"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("unsloth/gemma-3-270m-it", 270e6),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("meta-llama/Llama-3.1-8B", 8e9),
        ("nvidia/OpenMath2-Llama3.1-8B", 8e9),
        ("Qwen/Qwen2.5-14B-Instruct-1M", 14e9),  # a million tokens of context
        ("01-ai/Yi-34B-200K", 34e9),
        ("deepseek-ai/deepseek-moe-16b-chat", 16e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("models/smollm2_135m_q4_1.gguf", 135e6),
        ("/scratch/70b-runs/SmolLM2-135M-Instruct.Q4_1.gguf", 135e6),
        ("/models/8B/checkpoint-3", 8e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("my-models/pivot", None),
        ("microsoft/Phi-3-mini-128k-instruct", None),
        ("org/model-8bit", None),
        ("org/llama3.1", None),
    ],
)
def test_a_name_tells_the_size_or_nothing(name: str, parameters: float | None) -> None:
    assert size_of_name(name).parameters == parameters


CONFIGS = {  # as their owners publish them: keys of config.json, all parameters, and those that are active
    "Mixtral-8x7B": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_local_experts": 8}
        | {"num_experts_per_tok": 2, "vocab_size": 32000},
        46.7e9,
        12.9e9,
    ),
    "DeepSeek-V2-Lite": (
        {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27}
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
        15.7e9,
        2.4e9,
    ),
    "Qwen3-30B-A3B": (
        {"hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48}
        | {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
        30.5e9,
        3.3e9,
    ),
    "Llama-3.1-8B": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}, 8e9, 8e9),
}


@pytest.mark.parametrize(("config", "parameters", "active"), CONFIGS.values(), ids=CONFIGS)
def test_experts_that_a_token_passes_by_are_counted_from_the_config(
    config: dict[str, Any], parameters: float, active: float
) -> None:
    size = size_of_config(config)
    assert parameters - (size.idle or 0) == pytest.approx(active, rel=0.15)
    nested = size_of_config({"text_config": config})
    assert nested == size


def test_a_name_tells_active_parameters_too() -> None:
    assert size_of_name("Qwen/Qwen3-30B-A3B").idle == 27e9
    assert size_of_name("mistralai/Mixtral-8x7B-v0.1").idle == 6 * 7e9


def checkpoint(folder: Path, files: dict[str, list[list[int]]]) -> Path:
    """A folder of safetensors files of float32 tensors of these shapes, with an index if there are several."""
    folder.mkdir(parents=True)
    weight_map = {}
    for file, shapes in files.items():
        header, offset = {}, 0
        for number, shape in enumerate(shapes):
            size = 4 * shape[0] * shape[1]
            header[f"{file}.{number}"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 7, "num_hidden_layers": 2, "vocab_size": 300}))
    return folder


def test_files_tell_before_names_and_a_partial_download_tells_nothing(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "llama-8b", {"a.safetensors": [[10, 10]], "b.safetensors": [[5, 10], [1, 3]]})
    entry = PathModel(kind="path", path=str(folder), **LICENSED)
    size = size_of_base(entry, tmp_path / "none", {}, ModelSize())
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size == ModelSize(153, None, 7, 2, 300, on_disk)
    (folder / "b.safetensors").unlink()
    assert size_of_base(entry, tmp_path / "none", {}, ModelSize()).parameters == 8e9
    staged = size_of_base(entry, tmp_path / "none", {"parameters": 5, "hidden_size": 3}, ModelSize())
    assert (staged.parameters, staged.hidden_size) == (5, 3)


def test_the_study_tells_before_the_hub_and_the_hub_before_the_name(tmp_path: Path) -> None:
    hub = ModelSize(6e9, bytes=12e9)
    body: dict[str, Any] = {"kind": "hub", "repo": "a/model-9b", "revision": "0" * 40, **LICENSED}

    def size(told: ModelSize, **declared: float) -> ModelSize:
        return size_of_base(HubModel(**body, **declared), tmp_path, {}, told)

    assert size(ModelSize()).parameters == 9e9
    assert (size(hub).parameters, size(hub).bytes) == (6e9, 12e9)
    declared = size(hub, parameters=7e9, active_parameters=1e9)
    assert (declared.parameters, declared.idle) == (7e9, 6e9)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff" * 8,
        (5).to_bytes(8, "little") + b"[1,2]",
        (2).to_bytes(8, "little") + b"{}garbage"[:1],
        (19).to_bytes(8, "little") + b'{"a":{"shape":"xx"}}',
        (30).to_bytes(8, "little") + b'{"a":{"shape":[[[1]]],"d":1}}  ',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (23).to_bytes(8, "little") + b'{"a":{"shape":[1e400]}}',
    ],
)
def test_headers_that_cannot_be_read_tell_nothing(tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "pivot"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(damage)
    (folder / "config.json").write_text('{"hidden_size": "wide", "num_hidden_layers": true, "vocab_size": -1}')
    assert size_of_folder(folder) == ModelSize()


def test_a_gguf_file_tells_by_its_header_as_the_reference_reader_does(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(100)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "longer"])
    writer.add_token_scores([0.5, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = sum(int(tensor.n_elements) for tensor in reader.tensors)
    size = size_of_gguf(tmp_path / "model.gguf")
    assert size == ModelSize(values, 6 * 3 * 64 * 100 * 2, 64, 2, 3, 4 * values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"key" * 10,
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61) + bytes(50),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61) + bytes(50),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 8) + bytes(50),
    ],
)
def test_a_gguf_file_that_is_damaged_tells_nothing_and_soon(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert size_of_gguf(file) == ModelSize()


def test_rows_of_a_file_are_counted_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "row {i:03}"}}\n' for i in range(200)))
    rows = rows_of(file)
    assert rows is not None
    assert (rows.count, rows.bytes_each) == (200, 20)
    file.write_text('{"a": 1}')
    assert rows_of(file) is not None
    assert rows_of(tmp_path / "none.jsonl") is None


def test_a_size_that_the_study_states_changes_no_artifact_and_is_checked(tmp_path: Path) -> None:
    def fingerprints(**size: float) -> dict[str, str]:
        def change(data: dict[str, Any]) -> None:
            pivot = {"kind": "hub", "repo": "a/model", "revision": "0" * 40, **LICENSED, **size}
            data["models"]["base"]["pivot"] = pivot

        graph = build_graph(small_study(change))
        return {address: artifact.fingerprint for address, artifact in graph.artifacts.items()}

    assert fingerprints() == fingerprints(parameters=7e9, active_parameters=1e9)
    for wrong in ({"active_parameters": 1e9}, {"parameters": 1e9, "active_parameters": 2e9}):
        with pytest.raises(ValueError, match="active_parameters are a part of parameters"):
            fingerprints(**wrong)


def test_a_task_and_a_dataset_of_ones_own_are_as_long_as_their_files(tmp_path: Path) -> None:
    rows, items = tmp_path / "rows.jsonl", tmp_path / "items.jsonl"
    rows.write_text("".join('{"messages": "%s"}\n' % ("x" * 183) for _ in range(50)))
    items.write_text('{"question": "short"}\n' * 37)

    def change(data: dict[str, Any]) -> None:
        own: dict[str, Any] = {"kind": "path", "layout": "messages", "license": "mit", "path": str(rows)}
        data["datasets"]["noisy-code"] = own | {"domain": "code"}
        data["tasks"]["mmlu"]["items"] = own | {"layout": "mmlu", "path": str(items)}

    work = workload(study_file(tmp_path, change=change))
    assert (work.items("mmlu"), work.tokens("student")) == (37, 50)
    assert work.jobs["data/dataset/noisy-code"].disk == 50 * 200
