"""Hostile, odd and honest folders of models as data: each case is a change to the folder of a tiny good model.

``python -m tests.hostile.folders BASE PLACE`` runs all of them in one process of bounded memory, each within seconds,
through staging, loading and ``llmfusion merge``, and prints what happened as JSON lines.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SECRET = "secret-0ddba11-outside-the-folder"
SECONDS = 20  # for one way through one case; most take a few milliseconds
MEMORY = 3 * 2**30  # of address space beside what libraries take
OTHER_USER = 12345
Change = Callable[[Path], object]
SPECIAL = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "LICENSE",
)


# ------------------------------------------------------------------------------------------ ways to change a folder
def secret(folder: Path) -> Path:
    """A private file beside the folder, which is a Jinja text and begins like nothing that is read."""
    path = folder.parent / "secret.txt"
    if not path.exists():
        path.write_text(SECRET)
        path.chmod(0o600)
    return path


def gone(folder: Path, name: str) -> Path:
    path = folder / name
    path.unlink(missing_ok=True)
    return path


def link(name: str, target: str | None = None) -> Change:
    """A symbolic link to the secret, or to ``target``."""
    return lambda folder: gone(folder, name).symlink_to(target or secret(folder))


def fifo(name: str) -> Change:
    return lambda folder: os.mkfifo(gone(folder, name))


def directory(name: str) -> Change:
    return lambda folder: gone(folder, name).mkdir()


def unix_socket(name: str) -> Change:
    def change(folder: Path) -> None:
        gone(folder, name)
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(name)
        os.chdir(here)

    return change


def device(name: str) -> Change:
    return lambda folder: os.mknod(gone(folder, name), 0o20666, os.makedev(1, 5))


def foreign_hard_link(name: str) -> Change:
    def change(folder: Path) -> None:
        private = folder.parent / "theirs"
        shutil.copyfile(folder / name, private)
        os.chown(private, OTHER_USER, OTHER_USER)
        os.link(private, gone(folder, name))

    return change


def content(name: str, text: bytes | str) -> Change:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def settings(name: str, **changes: Any) -> Change:
    """Keys of a JSON file changed."""

    def change(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **changes}))

    return change


def config(**changes: Any) -> Change:
    return settings("config.json", **changes)


def without(name: str, *keys: str) -> Change:
    def change(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in old.items() if key not in keys}))

    return change


def tokenizer(change_body: Callable[[dict[str, Any]], object]) -> Change:
    """``tokenizer.json`` changed."""

    def change(folder: Path) -> None:
        body = json.loads((folder / "tokenizer.json").read_text())
        change_body(body)
        (folder / "tokenizer.json").write_text(json.dumps(body))

    return change


def weights(change_header: Callable[[dict[str, Any]], object] | None = None, text: bytes | None = None) -> Change:
    """The header of ``model.safetensors`` changed, or another ``text`` in its place."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        if change_header:
            change_header(header)
        new = json.dumps(header).encode() if text is None else text
        path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])

    return change


def entry(**changes: Any) -> Change:
    """The header's entry of one tensor changed."""
    return weights(lambda header: header["model.norm.weight"].update(changes))


def index(weight_map: Any, prepare: Change | None = None) -> Change:
    """The weights as a shard with an index of this ``weight_map``."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        if prepare:
            prepare(folder)

    return change


def outside(folder: Path) -> None:
    """Another model's weights beside the folder."""
    shutil.copyfile(folder / "shard.safetensors", folder.parent / "outside.safetensors")


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def snapshot(break_it: Change | None = None) -> Change:
    """The folder as huggingface_hub keeps it: links to ``blobs`` beside ``snapshots``."""

    def change(folder: Path) -> None:
        repository = folder.parent / "models--owner--name"
        place = repository / "snapshots" / ("0" * 40)
        place.mkdir(parents=True)
        (repository / "blobs").mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(repository / "blobs" / f"blob{number}")
            (place / path.name).symlink_to(f"../../blobs/blob{number}")
        folder.rmdir()
        folder.symlink_to(place)
        if break_it:
            break_it(place)

    return change


GOOD_GGUF = "as it is"
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**12


# ------------------------------------------------------------------------------------------------ hostile folders
def hostile_cases() -> Iterator[tuple[str, Change, str]]:
    """Name, change, and a word that the refusal has."""
    for name in SPECIAL:
        yield f"{name} is a link", link(name), name
        yield f"{name} is a FIFO", fifo(name), name
        yield f"{name} is a folder", directory(name), name
    yield "a relative link", link("chat_template.jinja", "../secret.txt"), "chat_template.jinja"
    yield "a link to nothing", link("vocab.json", "nothing"), "vocab.json"
    yield "a link to itself", link("vocab.json", "vocab.json"), "vocab.json"
    yield "a link to a device", link("merges.txt", "/dev/zero"), "merges.txt"
    yield "a link to a file of the folder", link("model-2.safetensors", "model.safetensors"), "model-2"
    yield "a link named as a tokenizer", link("tokenizer.model"), "tokenizer.model"
    yield "a socket", unix_socket("config.json"), "config.json"
    if os.geteuid() == 0:
        yield "a device", device("tokenizer.json"), "tokenizer.json"
        yield "a hard link to another user's file", foreign_hard_link("tokenizer.json"), "another owner"
    yield "a snapshot's link out of blobs", snapshot(link("config.json")), "config.json"
    yield "a snapshot's link far up", snapshot(link("config.json", "../../../../../etc/passwd")), "config.json"
    yield (
        "a snapshot's link through blobs",
        snapshot(link("config.json", "../../blobs/../../secret.txt")),
        "config.json",
    )
    yield "a blob is a link", snapshot(lambda f: link("blob0")(f.parent.parent / "blobs")), "blob0"
    yield "a blob is a FIFO", snapshot(lambda f: fifo("blob0")(f.parent.parent / "blobs")), "blob0"
    yield "a file's name has a line end", content("a\nerror: b.json", "{}"), "rename"
    yield "a file's name has braces", content("{output}.txt", "x"), "wildcards to Snakemake; rename"
    many = f"expected at most {1000:,}"
    yield "a thousand and one texts", lambda f: [(f / f"{n}.txt").touch() for n in range(1001)], many
    yield "only pickles", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled"
    yield "an empty folder", lambda f: [p.unlink() for p in f.iterdir()], "weights"
    yield "no folder", shutil.rmtree, "no folder"
    yield "a file instead of the folder", both(shutil.rmtree, lambda f: f.write_text("x")), "no folder"
    yield "a folder that is a link to itself", both(shutil.rmtree, lambda f: f.symlink_to(f)), "no folder"
    yield "no config.json", lambda f: (f / "config.json").unlink(), "config.json"
    yield from _indexes()
    yield from _headers()
    yield from _configs()
    yield from _tokenizers()


def _indexes() -> Iterator[tuple[str, Change, str]]:
    file = "model.safetensors.index.json"
    for name, weight_map in {
        "out of the folder": {"a": "../outside.safetensors"},
        "absolute": {"a": "/etc/passwd"},
        "absolute safetensors": {"a": "/tmp/x.safetensors"},
        "a subfolder": {"a": "sub/x.safetensors"},
        "here": {"a": "./shard.safetensors"},
        "up": {"a": ".."},
        "a NUL": {"a": "x\0.safetensors"},
        "a pickle": {"a": "shard.bin"},
        "a number": {"a": 1},
        "null": {"a": None},
        "a list": {"a": ["shard.safetensors"]},
        "nested": {"a": {"b": "shard.safetensors"}},
        "empty": {},
        "a list of names": ["shard.safetensors"],
        "text": "shard.safetensors",
        "huge": {f"t{i}": f"s{i}.safetensors" for i in range(100_000)},
        "absent": {"a": "absent.safetensors"},
        "a long name": {"a": "x" * 5000 + ".safetensors"},
    }.items():
        yield f"index: {name}", index(weight_map, outside), ".safetensors"
    right = {"a": "shard.safetensors"}
    yield "index: the shard is a link", index(right, link("shard.safetensors")), "shard.safetensors"
    yield "index: the shard is a FIFO", index(right, fifo("shard.safetensors")), "shard.safetensors"
    yield "index: a link", index(right, link(file)), file
    yield "index: a FIFO", index(right, fifo(file)), file
    yield "index: no JSON", index(right, content(file, "{")), file
    yield "index: deep", index(right, content(file, DEEP)), file
    yield "index: a JSON list", index(right, content(file, "[]")), file
    twice = {"a": "shard.safetensors", "b": "again.safetensors"}
    copy: Change = lambda f: shutil.copyfile(f / "shard.safetensors", f / "again.safetensors")  # noqa: E731
    yield "index: a tensor twice", index(twice, copy), "is also in"


def _rename(header: dict[str, Any], new: str) -> None:
    header[new] = header.pop("model.norm.weight")


def _headers() -> Iterator[tuple[str, Change, str]]:
    file = "model.safetensors"
    yield "weights: empty", content(file, b""), file
    yield "weights: three bytes", content(file, b"abc"), file
    yield "weights: length 0", content(file, b"\0" * 100), file
    yield "weights: a length over the file", content(file, struct.pack("<Q", 10**9) + b"{}"), file
    yield "weights: a length of 2^64-1", content(file, b"\xff" * 100), file
    yield "weights: text", content(file, "PK\x03\x04" * 100), file
    for name, text in {
        "no JSON": b"{",
        "a list": b"[]",
        "a number": b"1",
        "deep": DEEP.encode(),
        "no UTF-8": b'{"\xff\xfe": 1}',
        "nothing in it": b"{}",
        "only metadata": b'{"__metadata__": {"format": "pt"}}',
        "a key twice": b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}',
        "NaN": b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}',
        "a long number": b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    }.items():
        yield f"weights: {name}", weights(text=text), file
    for name, changes in {
        "no dtype": {"dtype": None},
        "a dtype of another type": {"dtype": ["F32"]},
        "an empty dtype": {"dtype": ""},
        "an unknown dtype": {"dtype": "F13"},
        "a shape of text": {"shape": "16"},
        "a shape of fractions": {"shape": [16.0]},
        "a shape of bools": {"shape": [True] * 4 + [16]},
        "a negative shape": {"shape": [-4, -4]},
        "an overflowing shape": {"shape": [2**62, 2**62, 4]},
        "an absurd shape": {"shape": [10**30]},
        "a thousand dimensions": {"shape": [1] * 1000 + [16]},
        "negative offsets": {"data_offsets": [-64, 0]},
        "offsets of fractions": {"data_offsets": [0.0, 64.0]},
        "offsets in reverse": {"data_offsets": [64, 0]},
        "offsets over the end": {"data_offsets": [0, 2**40]},
        "one offset": {"data_offsets": [0]},
        "no offsets": {"data_offsets": None},
        "an overlap": {"data_offsets": [0, 64]},
    }.items():
        yield f"weights: {name}", entry(**changes), file
    yield "weights: an entry is a list", weights(lambda h: h.update({"model.norm.weight": []})), file
    for name, tensor in {
        "a name that a terminal obeys": "\x1b[2J\x1b]0;x\x07",
        "a name with a NUL": "a\0b",
        "a name of two lines": "a\nb",
        "an empty name": "",
        "a name of a megabyte": "y" * 10**6,
    }.items():
        rename = partial(_rename, new=tensor)
        yield f"weights: {name}", weights(rename), "a tensor has the name"
    for name, metadata in {"a list": ["pt"], "of numbers": {"format": 1}, "a text": "pt"}.items():
        describe = partial(dict.update, __metadata__=metadata)
        yield f"weights: metadata that is {name}", weights(describe), "__metadata__"
    yield "weights: truncated", lambda f: os.truncate(f / file, 5000), file
    yield "weights: a tail", lambda f: (f / file).write_bytes((f / file).read_bytes() + b"\0" * 64), file
    yield "weights: a hole of 1 TB", lambda f: os.truncate(f / file, 2**40), file


def _configs() -> Iterator[tuple[str, Change, str]]:
    file = "config.json"
    for name, text in {
        "empty": b"", "no JSON": b"{", "a list": b"[]", "a text": b'"x"', "deep": DEEP.encode(),
        "no UTF-8": b"\xff\xfe{}", "nothing in it": b"{}",
        "a key twice": b'{"architectures": ["LlamaForCausalLM"], "a": 1, "a": 2}',
        "nested 500 levels": b'{"architectures": ["LlamaForCausalLM"], "a": ' + b"[" * 500 + b"]" * 500 + b"}",
    }.items():  # fmt: skip
        yield f"config: {name}", content(file, text), file
    classes = ([], "LlamaForCausalLM", None, [1], [None], [["LlamaForCausalLM"]], {"a": 1})
    names = ("AutoModel", "LlamaModel", "LlamaForSequenceClassification", "os", "PreTrainedModel", "GenerationMixin",
             "T5ForConditionalGeneration", "LlamaConfig", "__name__", "", "Own\nForCausalLM", "x" * 10_000)  # fmt: skip
    for value in (*classes, *([name] for name in names)):
        yield f"config: architectures {str(value)[:40]!r}", config(architectures=value), ""
    odd: dict[str, list[Any]] = {
        "model_type": [5, ["llama"], {"a": 1}],
        "vocab_size": ["300", -1, 0, 2.5, HUGE, 10**30, [], {}, True, 10**9],
        "hidden_size": ["16", 0, -3, HUGE, 10**9, 17, [16]],
        "num_hidden_layers": ["2", -1, HUGE, 10**6, [2], 2.0, True, 10**400],
        "num_attention_heads": [0, -1, "2", 7, 10**9],
        "num_key_value_heads": [0, "1", 10**9],
        "intermediate_size": ["x", -1, HUGE, None],
        "max_position_embeddings": [-1, "x", 0, 10**30],
        "head_dim": [10**9, "x", -2],
        "rope_parameters": ["x", [], {"rope_type": "none"}, {"rope_type": "yarn", "factor": "x"}],
        "rope_scaling": ["x", {"type": "../x", "factor": 2.0}, {"rope_type": "llama3"}],
        "dtype": ["load", 1, {}, ["float32"], "os"],
        "torch_dtype": ["load", "__file__"],
        "quantization_config": [{"quant_method": "gptq"}, "x", {"quant_method": "../x", "bits": 4}],
        "num_labels": [10**9, "x", -1],
        "id2label": ["x", [1]],
        "hidden_act": ["x", "os.system", 1, None],
        "is_encoder_decoder": [True],
        "layer_types": ["x", ["x"] * 2, ["full_attention"] * 100_000],
        "per_layer_config": ["x", {"0": 1}],
        "rms_norm_eps": ["x", None],
        "sliding_window": [10**30],
    }
    for key, values in odd.items():
        for value in values:
            yield f"config: {key} {str(value)[:30]!r} ({type(value).__name__})", config(**{key: value}), ""


def _growing_tokenizers() -> Iterator[tuple[str, str, Any, str]]:
    """Parts of ``tokenizer.json`` that make more of a text, or take longer for it, than any text is worth."""
    hundredfold = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 100}
    yield "a text 10^12 times as long", "normalizer", {"type": "Sequence", "normalizers": [hundredfold] * 6}, "1e+12"
    yield "a megabyte before every text", "normalizer", {"type": "Prepend", "prepend": "a" * 10**6}, "1e+06"
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    named = {"<s>": {"id": "<s>", "ids": [99999], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": named}
    yield "10,000 tokens before every text", "post_processor", {**template, "single": [begin] * 10**4}, "adds"
    yield "a token over the rows before every text", "post_processor", {**template, "single": [begin, text]}, "rows"
    yield "30,000 added tokens", "added_tokens", [{"id": 0, "content": "x"}] * 30_000, "at most 20,000"
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+[^a ]"}, "behavior": "Isolated", "invert": False}
    yield "a pattern that tries all ways to cut", "pre_tokenizer", split, "retry-limit"


def _tokenizers() -> Iterator[tuple[str, Change, str]]:
    file = "tokenizer.json"
    for name, text in {"empty": b"", "no JSON": b"{", "a list": b"[]", "nothing in it": b"{}", "deep": DEEP.encode(),
                       "no UTF-8": b"\xff{}", "a null model": b'{"model": null}'}.items():  # fmt: skip
        yield f"tokenizer: {name}", content(file, text), file
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "no model": lambda body: body.pop("model"),
        "no vocabulary": lambda body: body["model"].pop("vocab"),
        "a vocabulary of numbers": lambda body: body["model"].update(vocab=[1, 2, 3]),
        "ids of text": lambda body: body["model"].update(vocab=dict.fromkeys("abc", "x")),
        "negative ids": lambda body: body["model"]["vocab"].update(zebra=-1),
        "an absurd id": lambda body: body["model"]["vocab"].update(zebra=2**40),
        "an id over the rows": lambda body: body["model"]["vocab"].update(zebra=5000),
        "added tokens of text": lambda body: body.update(added_tokens="x"),
        "added tokens of numbers": lambda body: body.update(added_tokens=[1]),
        "an added token without a place": lambda body: body["added_tokens"].append({"content": "x"}),
        "an unknown model": lambda body: body["model"].update(type="Own"),
        "merges of numbers": lambda body: body["model"].update(merges=[1]),
        "merges of unknown tokens": lambda body: body["model"].update(merges=[["zz", "yy"]]),
        "a normaliser of text": lambda body: body.update(normalizer="x"),
        "an impossible pattern": lambda body: body.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
        ),
        "a decoder of another library": lambda body: body.update(decoder={"type": "Own"}),
    }
    for name, change_body in changes.items():
        yield f"tokenizer: {name}", tokenizer(change_body), ""
    for name, part, made, word in _growing_tokenizers():
        yield f"tokenizer: {name}", tokenizer(partial(dict.update, **{part: made})), word
    emptied: dict[str, Any] = {"vocab": {}, "merges": []}
    yield "tokenizer: an empty vocabulary", tokenizer(lambda body: body["model"].update(emptied)), "is empty"
    yield "tokenizer: cuts at random", tokenizer(lambda body: body["model"].update(dropout=0.5)), "at random"
    file = "tokenizer_config.json"
    for name, text in {"no JSON": b"{", "a list": b"[]", "deep": DEEP.encode(), "no UTF-8": b"\xff{}",
                       "a key twice": b'{"a": 1, "a": 2}'}.items():  # fmt: skip
        yield f"tokenizer settings: {name}", content(file, text), file
    odd: dict[str, list[Any]] = {
        "chat_template": [1, True, {"a": "b"}, [1], [{"name": 1, "template": "x"}], [{"name": "x"}], 2.5],
        "eos_token": [5, [], {"content": 1}, None, True],
        "pad_token": [7, ["x"]],
        "added_tokens_decoder": ["x", {"a": 1}, {"0": "x"}],
        "extra_special_tokens": [5, [1]],
    }
    for key, values in odd.items():
        for value in values:
            named = gone_template if key == "chat_template" else lambda folder: None
            yield f"tokenizer settings: {key} {value!r}", both(named, settings(file, **{key: value})), ""
    yield (
        "special tokens: a list",
        both(without(file, "added_tokens_decoder"), content("special_tokens_map.json", "[]")),
        "",
    )
    yield "chat template: no UTF-8", content("chat_template.jinja", b"\xff\xfe\xfa"), "chat_template.jinja"
    yield "no tokenizer at all", lambda f: [p.unlink() for p in f.glob("*token*")], "tokenizer"
    file = "generation_config.json"
    for name, text in {"no JSON": b"{", "a list": b"[]", "deep": DEEP.encode(),
                       "an end token of text": b'{"eos_token_id": "x"}', "nested end tokens": b'{"eos_token_id": [[1]]}'}.items():  # fmt: skip  # noqa: E501
        yield f"generation settings: {name}", content(file, text), file


def gone_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ honest folders
def honest_cases() -> Iterator[tuple[str, Change]]:
    """Folders that are accepted, among them some whose settings would lead outside if anybody followed them."""
    yield "as it is", lambda folder: None
    yield "a README and pickles beside it", both(content("README.md", "x"), content("pytorch_model.bin", b"x"))
    yield "code beside it", both(content("own.py", "x"), content("own.json", "{}"))
    yield "subfolders", lambda f: [(f / name).mkdir() for name in ("original", "onnx")]
    yield "a link that is not read", link("README.md")
    yield "shards", shards
    yield "shards without an index's metadata", both(shards, without("model.safetensors.index.json", "metadata"))
    yield "a snapshot of links", snapshot()
    yield "a snapshot of shards", both(shards, snapshot())
    yield "files nobody may write", lambda f: [p.chmod(0o444) for p in f.iterdir()]
    yield "a folder nobody may write", lambda f: f.chmod(0o555)
    yield "private files", lambda f: [p.chmod(0o600) for p in f.iterdir()]
    yield "another file system", move("/dev/shm")
    yield "spaces and letters of all kinds", rename("a model  ü 模型 {x} $(id)")
    yield "generation settings", settings("generation_config.json", eos_token_id=[0, 1], repetition_penalty=1.1)
    yield "a template of its own", content("chat_template.jinja", "{{ messages[0]['content'] }}")
    yield "named templates", named_templates
    yield "a sentencepiece model beside tokenizer.json", content("tokenizer.model", b"x")
    yield "a model_max_length of 1e30", settings("tokenizer_config.json", model_max_length=int(1e30))
    yield "half precision", half
    yield "tied heads", tied
    for key, value in {
        "_attn_implementation": "owner/kernel",
        "attn_implementation": "owner/kernel",
        "_attn_implementation_internal": "owner/kernel",
        "experts_implementation": "owner/kernel",
        "auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "owner/repo--own.Own"},
        "transformers_weights": "../outside.safetensors",
        "configuration_files": ["config.9.9.9.json"],
        "fusion_config": {"patch_embeddings": True},
        "get_text_config": 1,
        "to_dict": "x",
        "__class__": "x",
        "attribute_map": {"vocab_size": "hidden_size"},
        "_name_or_path": "/etc",
        "base_model_tp_plan": {"layers.*": "x"},
        "quantization_config": None,
        "max_position_embeddings": 10**7,
        "output_attentions": True,
        "time_step_limit": [0.0, float("inf")],
    }.items():
        yield f"config: {key}", config(**{key: value})
    for key, value in {
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "../secret.txt",
        "gguf_file": "x.gguf",
        "fast_tokenizer_files": ["tokenizer.9.9.9.json"],
        "init_inputs": [1, 2],
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
        "tokenizer_class": "OwnTokenizer",
        "name_or_path": "/etc",
        "tokenizer_object": "x",
        "backend": "x",
    }.items():
        yield f"tokenizer settings: {key}", settings("tokenizer_config.json", **{key: value})


def _tensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def shards(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = _tensors(folder)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def half(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.half() for name, tensor in _tensors(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tied(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = _tensors(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config(tie_word_embeddings=True)(folder)


def named_templates(folder: Path) -> None:
    gone_template(folder)
    templates = [{"name": "default", "template": "{{ messages[0]['content'] }}"}, {"name": "rag", "template": "x"}]
    settings("tokenizer_config.json", chat_template=templates)(folder)


def move(place: str) -> Change:
    def change(folder: Path) -> None:
        target = Path(place) / f"llmfusion-test-{os.getpid()}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        shutil.rmtree(folder)
        folder.symlink_to(target)

    return change


def rename(name: str) -> Change:
    def change(folder: Path) -> None:
        folder.rename(folder.parent / name)
        folder.symlink_to(folder.parent / name)

    return change


# ------------------------------------------------------------------------------------------------ GGUF
def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: Any) -> bytes:
    """A value of metadata with its type: uint32, float32, a text, or a list of these."""
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    items = b"".join(gguf_value(item)[4:] for item in value)
    kind = int.from_bytes(gguf_value(value[0])[:4], "little") if value else 8
    return struct.pack("<IIQ", 9, kind, len(value)) + items


TOKENS = ["<|endoftext|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab"]
GGUF_KEYS: dict[str, Any] = {
    "general.architecture": "qwen2",
    "qwen2.context_length": 64,
    "qwen2.block_count": 1,
    "qwen2.embedding_length": 32,
    "qwen2.feed_forward_length": 32,
    "qwen2.attention.head_count": 2,
    "qwen2.attention.head_count_kv": 1,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, *[1] * (len(TOKENS) - 1)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}
GGUF_SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (32, len(TOKENS)),
    "output.weight": (32, len(TOKENS)),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_q.bias": (32,),
    "blk.0.attn_k.weight": (32, 16),
    "blk.0.attn_k.bias": (16,),
    "blk.0.attn_v.weight": (32, 16),
    "blk.0.attn_v.bias": (16,),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_gate.weight": (32, 32),
    "blk.0.ffn_up.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 32),
}


def gguf(
    keys: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    kind: int = 0,
    step: int | None = None,
    raw_keys: bytes = b"",
    cut: int | None = None,
) -> bytes:
    """A GGUF file; ``raw_keys`` stand first, ``step`` is the distance of offsets if not that of the tensors."""
    keys = GGUF_KEYS if keys is None else keys
    shapes = GGUF_SHAPES if shapes is None else shapes
    entries = b""
    offset = 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        entries += gguf_string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        entries += struct.pack("<IQ", kind, offset)
        offset += (-(-size // 32) * 32 if step is None else step) % 2**60
    number = len(keys) + bool(raw_keys)
    counts = (len(shapes) if tensor_count is None else tensor_count, number if key_count is None else key_count)
    head = magic + struct.pack("<IQQ", version, *counts) + raw_keys
    head += b"".join(gguf_string(key) + gguf_value(value) for key, value in keys.items()) + entries
    head += b"\0" * (-len(head) % 32)
    data = b"\0\0\x80\x3f" * (min(offset, 2**20) // 4)
    return (head + data)[:cut]


def gguf_cases() -> Iterator[tuple[str, bytes]]:
    """Files that are refused."""

    def changed(**keys: Any) -> dict[str, Any]:
        return {key: value for key, value in {**GGUF_KEYS, **keys}.items() if value is not None}

    def key(name: str, raw: bytes) -> bytes:
        return gguf_string(name) + raw

    yield "empty", b""
    yield "three bytes", b"GGU"
    yield "only the magic bytes", b"GGUF"
    yield "text", SECRET.encode() * 10
    yield "other magic bytes", gguf(magic=b"GGML")
    yield "version 1", gguf(version=1)
    yield "version 99", gguf(version=99)
    yield "big-endian", gguf(version=3 << 24)
    yield "cut in the keys", gguf(cut=300)
    yield "cut in the tokens", gguf(cut=900)
    yield "cut in the tensors", gguf(cut=-500)
    yield "2^63 tensors", gguf(tensor_count=2**63)
    yield "2^63 keys", gguf(key_count=2**63)
    yield "more keys than there are", gguf(key_count=40)
    yield "a key of 2^62 bytes", gguf(raw_keys=struct.pack("<Q", 2**62) + b"x")
    yield "a text of 2^40 bytes", gguf(raw_keys=key("x", struct.pack("<IQ", 8, 2**40)))
    yield "an array of 2^60 numbers", gguf(raw_keys=key("x", struct.pack("<IIQ", 9, 4, 2**60)))
    yield "an array of 2^60 texts", gguf(raw_keys=key("x", struct.pack("<IIQ", 9, 8, 2**60)))
    yield "an array of arrays", gguf(raw_keys=key("x", struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ", 9, 1) * 2))
    yield "a value of type 77", gguf(raw_keys=key("x", struct.pack("<I", 77)))
    yield "an array of type 77", gguf(raw_keys=key("x", struct.pack("<IIQ", 9, 77, 1)))
    yield "a key twice", gguf(raw_keys=gguf_string("general.architecture") + gguf_value("llama"))
    yield "a key that is no UTF-8", gguf(raw_keys=gguf_string(b"\xff\xfe") + gguf_value(1))
    yield (
        "a name that is no UTF-8",
        gguf(changed(**{"general.name": "x"})).replace(b"output_norm", b"output_n\xff\xff\xff"),
    )
    yield "an alignment of 0", gguf(changed(**{"general.alignment": 0}))
    yield "an alignment of 33", gguf(changed(**{"general.alignment": 33}))
    yield "an alignment of 2^31", gguf(changed(**{"general.alignment": 2**31}))
    yield "an alignment of text", gguf(changed(**{"general.alignment": "x"}))
    yield "no tensors", gguf(shapes={})
    yield "more layers than it says", gguf(shapes={**GGUF_SHAPES, "blk.7.attn_norm.weight": (16,)})
    yield "an absurd shape", gguf(shapes={**GGUF_SHAPES, "x": (2**62, 2**62)})
    yield "a shape of 0", gguf(shapes={**GGUF_SHAPES, "x": (0, 4)})
    yield "ten dimensions", gguf(shapes={**GGUF_SHAPES, "x": (1,) * 10})
    yield "an unknown type of tensors", gguf(kind=999)
    yield "a type that the bytes do not have", gguf(kind=28)
    yield "a quantised row that is no block", gguf(shapes={**GGUF_SHAPES, "output_norm.weight": (17,)}, kind=8)
    yield "tensors that overlap", gguf(step=32)
    yield "offsets that are not aligned", gguf(step=4)
    yield "offsets far behind the end", gguf(step=2**50)
    for name, value in {
        "general.architecture": [None, 7, "", "own", "qwen2\n", "bert", "mamba", "t5"],
        "qwen2.block_count": [None, 0, 2**31, 3, "1", [1]],
        "qwen2.embedding_length": [None, 2**31, 16, "x"],
        "qwen2.attention.head_count": [None, 0, 7, 2**31],
        "qwen2.feed_forward_length": [None, 2**31],
        "qwen2.attention.layer_norm_rms_epsilon": ["x"],
        "qwen2.rope.freq_base": ["x"],
        "tokenizer.ggml.model": [None, "own", 1],
        "tokenizer.ggml.tokens": [None, [], "x", [1, 2], TOKENS * 2, TOKENS[:5]],
        "tokenizer.ggml.merges": [["x"], [1], "x"],
        "tokenizer.ggml.token_type": ["x"],
        "tokenizer.ggml.eos_token_id": [2**31, "x", len(TOKENS)],
    }.items():
        for one in value:
            length = len(one) if isinstance(one, list) else 1
            yield f"{name} {str(one)[:20]!r} ({type(one).__name__} of {length})", gguf(changed(**{name: one}))
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"):
        rest = {key: shape for key, shape in GGUF_SHAPES.items() if key != name}
        yield f"without {name}", gguf(shapes=rest)
        yield f"{name} of another shape", gguf(shapes={**GGUF_SHAPES, name: (*GGUF_SHAPES[name][:-1], 64)})


def special_gguf_cases() -> Iterator[tuple[str, Change]]:
    """What lies where a GGUF file should, and is none."""
    yield "a FIFO", fifo("model.gguf")
    yield "a folder", directory("model.gguf")
    yield "a link", link("model.gguf")
    yield "a link to itself", link("model.gguf", "model.gguf")
    yield "nothing", lambda folder: None
    yield "a socket", unix_socket("model.gguf")


# ------------------------------------------------------------------------------------------------ running them
class TooLong(KeyboardInterrupt):
    """A case took more than its seconds."""


def _alarm(*_: object) -> None:
    raise TooLong


def outcome(action: Callable[[], object]) -> dict[str, Any]:
    """How an action ended: ``ok``, ``refused`` with a message, or ``broken`` with a traceback."""
    from llmfusion.errors import UserError

    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    started = time.monotonic()
    try:
        action()
        result = {"end": "ok", "message": ""}
    except UserError as error:
        result = {"end": "refused", "message": str(error)}
    except TooLong:
        result = {"end": "broken", "message": f"took more than {SECONDS} s"}
    except BaseException:
        result = {"end": "broken", "message": traceback.format_exc()}
    finally:
        signal.alarm(0)
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def leaks(*places: Path) -> list[str]:
    """Files of a result that hold the secret, and links in it."""
    found = [path for place in places for path in place.rglob("*") if path.is_symlink() or path.is_file()]
    small = [path for path in found if not path.is_symlink() and path.stat().st_size < 2**26]
    linked = [str(path) for path in found if path.is_symlink()]
    return linked + [str(path) for path in small if SECRET.encode() in path.read_bytes()]


def stage(source: Path, place: Path) -> dict[str, Any]:
    """The step that stages a base model, and what it leaves in its draft."""
    from llmfusion.steps.stage_base import build
    from tests.unit.stand_ins import job

    shutil.rmtree(place, ignore_errors=True)
    kind = "gguf" if source.name.endswith(".gguf") else "path"
    base = {"kind": kind, "path": str(source), "license": "mit", "vocabulary": "v"}
    made = job(place, {"base": base})
    return outcome(lambda: build(made)) | {"leaks": leaks(made.folder)}


def load(source: Path) -> dict[str, Any]:
    """An artifact whose manifest lists whatever lies in the folder."""
    from llmfusion.models.loading import load_model, load_tokenizer
    from tests.unit.stand_ins import artifact

    def both_parts() -> None:
        made = artifact(source)
        printed = str(load_tokenizer(made, None).chat_template)
        load_model(made, "float32")
        assert SECRET not in printed

    return outcome(both_parts)


def merge(pivot: Path, model: Path, place: Path, is_done: bool) -> dict[str, Any]:
    """``llmfusion merge`` by hand, or its plan alone; a traceback or another status than 0 and 2 is broken."""
    from llmfusion.cli.main import main

    shutil.rmtree(place, ignore_errors=True)
    printed = io.StringIO()
    words = ["merge", "--method", "ta", "--pivot", pivot, "--models", model, "--out", place, "--threads", "1"]
    words += [] if is_done else ["--dry-run"]
    status: list[int] = []
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        result = outcome(lambda: status.append(main([str(word) for word in words])))
    if result["end"] == "ok" and status != [0]:
        result["end"] = "refused" if status == [2] and "error: " in printed.getvalue() else "broken"
        result["message"] = printed.getvalue()
    return result | {"leaks": leaks(place) if place.exists() else []}


def run_all(base: Path, place: Path) -> Iterator[dict[str, Any]]:
    """All cases, one after the other."""
    hostile = [(name, change, word) for name, change, word in hostile_cases()]
    for name, change, word in [*hostile, *((name, change, None) for name, change in honest_cases())]:
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "model"
        shutil.copytree(base, folder)
        change(folder)
        ways = {"stage": stage(folder, place / "staged"), "load": load(folder)}
        other = folder if name == "tied heads" else base
        is_done = not name.startswith(("config: ", "tokenizer: ", "tokenizer settings: "))  # merges copy them
        ways["merge as pivot"] = merge(folder, other, place / "merged", is_done)
        ways["merge as model"] = merge(other, folder, place / "merged", is_done)
        yield {"name": name, "word": word, "ways": ways}
    files: list[tuple[str, Change]] = [(name, content("model.gguf", raw)) for name, raw in gguf_cases()]
    for name, change in [*files, *special_gguf_cases(), (GOOD_GGUF, content("model.gguf", gguf()))]:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        change(place)
        word = None if name == GOOD_GGUF else "model.gguf"
        yield {"name": f"gguf: {name}", "word": word, "ways": {"stage": stage(place / "model.gguf", place / "staged")}}


def main() -> None:
    """Run all cases in a bounded address space."""
    import numba  # noqa: F401
    import torch
    import transformers

    from llmfusion.models import loading  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    base, place = map(Path, sys.argv[1:])
    for result in run_all(base, place):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
