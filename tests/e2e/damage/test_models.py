"""What hashes cannot see in a model: broken files under an honest manifest, and weights that do not stay finite."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts import store
from llmfusion.artifacts.store import Draft, draft_folder, publish
from llmfusion.errors import UserError
from tests.e2e.damage.finished import CODE, GENERATED, MERGED, PIVOT, RESULTS, SFT, SHARD, Make, manifest_path, remake
from tests.e2e.damage.spoil import Cases, Spoil, cases, cast, header, put, rewrite, settings, tensors, unlink

WEIGHT = "model.layers.1.mlp.up_proj.weight"
W = re.escape(WEIGHT)
FILE = "model.safetensors"
NAN, INFINITY = float("nan"), float("inf")
OWN_CODE = "import pathlib\npathlib.Path('ran').touch()\n"


class Poison:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def pickled(folder: Path) -> None:
    import torch

    torch.save({"model.norm.weight": Poison()}, folder / "pytorch_model.bin")


def only_pickled(folder: Path) -> None:
    pickled(folder)
    (folder / FILE).unlink()


def lost_shard(folder: Path) -> None:
    (folder / FILE).rename(folder / "model-00001-of-00002.safetensors")
    names = {WEIGHT: "model-00002-of-00002.safetensors", "model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def own_code(folder: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    settings("config.json", {"architectures": ["OwnForCausalLM"], "auto_map": auto_map})(folder)
    (folder / "own.py").write_text(OWN_CODE)


def own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    settings("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map})(folder)
    (folder / "own.py").write_text(OWN_CODE)


def only_own_tokenizer(folder: Path) -> None:
    own_tokenizer(folder)
    (folder / "tokenizer.json").unlink()


def in_bfloat16(content: dict[str, Any]) -> None:
    content.update({name: tensor.bfloat16() for name, tensor in content.items()})


HEADERS: Cases = {  # refused by whoever reads tensors, trainings and merges alike
    "half a header": (rewrite(FILE, lambda c: c[:200]), r"model\.safetensors: no safetensors header"),
    "half the tensors": (
        rewrite(FILE, lambda c: c[: len(c) // 2]),
        r"model\.safetensors: tensor \S+ ends at byte \d+, the file at \d+",
    ),
    **cases(
        header,
        FILE,
        {
            "offsets that leave a gap": (lambda h: h.pop(WEIGHT), r": tensor \S+ begins at byte \d+, expected \d+"),
            "a shape that is not its size": (
                lambda h: h[WEIGHT].update(shape=[176, 63]),
                rf": tensor {W}: F32 \[176, 63\] takes 44352 bytes",
            ),
            "a tensor without offsets": (lambda h: h[WEIGHT].pop("data_offsets"), rf": tensor {W}: the"),
        },
    ),
}
TENSORS = cases(
    tensors,
    FILE,
    {
        "missing tensor": (lambda t: t.pop(WEIGHT), rf": .*{W} is missing"),
        "extra tensor": (lambda t: t.update(extra=t[WEIGHT] + 1), ": .*extra is not the model's"),
        "another shape": (lambda t: t.update({WEIGHT: t[WEIGHT][:3]}), rf": .*{W} is \[3, 64\], expected \[176, 64\]"),
        "a NaN": (put(WEIGHT, (5, 6), NAN), f": tensor {W} is not finite"),
        "infinity": (put(WEIGHT, (5, 6), INFINITY), f": tensor {W} is not finite"),
        "minus infinity": (put(WEIGHT, (175, 63), -INFINITY), f": tensor {W} is not finite"),
        "float64": (cast(WEIGHT, "float64"), f": .*{W} is F64, expected F32 or BF16 or F16"),
        "integers": (cast(WEIGHT, "int64"), f": .*{W} is I64, expected"),
        "float8": (cast(WEIGHT, "float8_e4m3fn"), f": .*{W} is F8_E4M3, expected"),
        "a head beside the tied one": (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}),
            r": .*a head of its own, where config\.json ties it",
        ),
    },
)
BYTES = cases(
    rewrite,
    FILE,
    {
        "zeros for a header": (lambda c: bytes(len(c)), ": no safetensors header"),
        "a header of no JSON": (lambda c: c[:20] + b"\xff" + c[21:], ": the header: expected JSON"),
        "bytes behind the tensors": (lambda c: c + b"more", r": has \d+ bytes, its tensors end at \d+"),
    },
)
CONFIG: Cases = {
    case: (settings("config.json", changed), message)
    for case, (changed, message) in {
        "another class": ({"architectures": ["LlamaConfig"]}, "has no class 'LlamaConfig'"),
        "no class": (
            {"architectures": [None]},
            r"config\.json: architectures is \[None\], expected a list with the name of a class",
        ),
        "fewer layers than tensors": ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is not the model's"),
        "more layers than tensors": ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        "a setting of another type": (
            {"hidden_size": "wide"},
            r"config\.json: hidden_size is 'wide', expected a whole number",
        ),
        "no heads": ({"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0, expected a whole number"),
        "quantised weights": (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "base/pivot: its weights are quantised",
        ),
    }.items()
}
JSON_FILES: Cases = {
    f"half a {file}": (rewrite(file, lambda c, size=size: c[:size]), rf"{re.escape(file)}: expected JSON")
    for file, size in {
        "config.json": 40,
        "generation_config.json": 9,
        "tokenizer.json": 999,
        "tokenizer_config.json": 9,
    }.items()
}
MODELS: Cases = {
    **TENSORS,
    **HEADERS,
    **BYTES,
    "pickled weights only": (only_pickled, r"base/pivot: has no \.safetensors weights; pickled weights are never read"),
    "a shard the index names": (
        lost_shard,
        r"base/pivot/model-00002-of-00002\.safetensors: is missing: expected a plain file inside",
    ),
    "code of its own": (own_code, r"has no class 'OwnForCausalLM'; code from its repository \(auto_map\) is never run"),
    "only a tokenizer of its own": (
        only_own_tokenizer,
        "base/pivot: the tokenizer cannot be loaded: ValueError: ",
    ),
    **CONFIG,
    **JSON_FILES,
    "a list for config.json": (
        rewrite("config.json", lambda c: b"[]"),
        r"config\.json: expected a JSON object, found list",
    ),
    "no tokenizer.json": (unlink("tokenizer.json"), "base/pivot: the tokenizer cannot be loaded"),
    "half a chat template": (
        rewrite("chat_template.jinja", lambda c: c[:-5]),
        r"base/pivot: the chat template, line \d+: ",
    ),
}


def load(address: str) -> Any:
    from llmfusion.models.loading import load_model, load_tokenizer

    artifact = store.read(manifest_path(address))
    load_tokenizer(artifact, None)
    return load_model(artifact, "float32")


@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_with_an_honest_manifest_is_refused_by_file_and_tensor(study: Path, case: str) -> None:
    spoil, message = MODELS[case]
    remake(PIVOT, spoil)
    with pytest.raises(UserError, match=message):
        load(PIVOT)
    assert not Path("ran").exists()
    assert not Path("unpickled").exists()


def test_the_pickle_is_one_that_runs_when_it_is_read(study: Path) -> None:
    import torch

    pickled(study)
    torch.load("pytorch_model.bin", weights_only=False)
    assert Path("unpickled").exists()


SOUND: dict[str, Spoil] = {
    "as it was": lambda folder: None,
    "a pickle beside it": pickled,
    "bfloat16": tensors(FILE, in_bfloat16),
    "code beside its tokenizer": own_tokenizer,
    "no class of a tokenizer": settings("tokenizer_config.json", {"tokenizer_class": "LlamaForCausalLM"}),
}  # of a tokenizer, tokenizer.json is what counts


@pytest.mark.parametrize("spoil", SOUND.values(), ids=SOUND)
def test_what_is_sound_loads_and_neither_pickles_nor_code_beside_it_are_read(study: Path, spoil: Spoil) -> None:
    remake(PIVOT, spoil)
    assert not Path("ran").exists()
    facts = json.loads(manifest_path(PIVOT).read_text())["facts"]
    assert sum(p.numel() for p in load(PIVOT).parameters()) == facts["parameters"]
    assert not Path("unpickled").exists()


USERS = {SFT: PIVOT, CODE: PIVOT, SHARD: CODE, GENERATED: CODE, "answers/trained/sft/all": SFT, MERGED: SFT}


@pytest.mark.parametrize("address", USERS)
def test_every_step_that_takes_a_model_refuses_a_nan_in_it(message_of_step: Make, address: str) -> None:
    remake(USERS[address], tensors(FILE, put(WEIGHT, (0, 0), NAN)))
    expected = rf"results/{USERS[address]}/model\.safetensors: tensor {W} (is not finite|holds a NaN)"
    assert re.match(expected, message_of_step(address))


PARENTS: Cases = {
    case: (tensors(FILE, change), message)
    for case, (change, message) in {
        "missing tensor": (lambda t: t.pop(WEIGHT), rf"{W} is missing in \S+{SFT}"),
        "extra tensor": (lambda t: t.update(extra=t[WEIGHT] + 1), rf"extra of \S+{SFT} is not in the pivot"),
        "another shape": (
            lambda t: t.update({WEIGHT: t[WEIGHT][:3]}),
            rf"{W} is \[3, 64\] in \S+{SFT} and \[176, 64\] in the pivot",
        ),
        "integers": (cast(WEIGHT, "int64"), rf"{W} of \S+{SFT} is I64, the pivot's F32"),
        "infinity": (
            put(WEIGHT, (5, 6), INFINITY),
            rf"{SFT}/model\.safetensors: tensor {W} holds a NaN or an infinity",
        ),
    }.items()
}
MERGES: Cases = {
    **PARENTS,
    **HEADERS,
    "pickled weights only": (only_pickled, rf"{SFT}: has no \.safetensors weights; pickled weights are never read"),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_broken_parent_is_not_merged(message_of_step: Make, case: str) -> None:
    spoil, message = MERGES[case]
    remake(SFT, spoil)
    assert re.search(message, message_of_step(MERGED))


def test_a_broken_checkpoint_is_not_staged(message_of_step: Make, study: Path) -> None:
    folder = shutil.copytree(study / "results" / PIVOT, study / "given")
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    message = message_of_step(CODE, kind="path", path=str(folder), license="mit", vocabulary="mini")
    assert re.match(r"\S+/given/model\.safetensors: tensor \S+ ends at byte .*truncated", message), message


def test_a_training_whose_last_step_overflows_publishes_nothing(message_of_step: Make) -> None:
    message = message_of_step(SFT, steps=1, weight_decay=1e42)
    assert re.search(r"tensor \S+ is not finite in float32; nothing was published", message)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_merge_that_overflows_publishes_nothing(message_of_step: Make) -> None:
    message = message_of_step(MERGED, weight=1e41)
    assert re.search(r"tensor \S+: the merge is not finite in F32; nothing was published", message)


def test_weights_that_only_their_rounding_makes_infinite_are_not_saved(study: Path) -> None:
    from llmfusion.models.loading import load_tokenizer, save_model

    model = load(PIVOT)
    model.model.norm.weight.data[3] = 3.4028e38  # finite in float32, beyond the largest number of bfloat16
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is not finite in bfloat16"):
        save_model(model, load_tokenizer(study / RESULTS / PIVOT, None), study / "saved", "bfloat16")
    assert not (study / "saved").exists()


def test_states_that_overflow_are_not_cached(message_of_step: Make) -> None:
    every_weight_finite = tensors(FILE, lambda t: t["model.norm.weight"].fill_(3e38))  # not what comes of them
    remake(CODE, every_weight_finite)
    expected = "sample [0-9a-f]{40}: the teacher's states are not finite; nothing was published"
    assert re.match(expected, message_of_step(SHARD))


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_facts_that_are_not_finite_are_not_published(study: Path, value: float) -> None:
    output = Path("results/models/base/new/manifest.json")
    draft = Draft("models/base/new", "{}", {}, draft_folder(output, "token"), {"sound": 1.0, "loss": {"last": [value]}})
    draft.folder.mkdir(parents=True)
    with pytest.raises(UserError, match="models/base/new: loss: a number that is not finite; nothing was published"):
        publish(draft, output, {})
    assert not output.parent.exists()
