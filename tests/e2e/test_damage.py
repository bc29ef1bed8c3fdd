"""Damage is refused before use: what hashes see, what only tensors and lines can tell, and every step at the command line."""

import hashlib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llmfusion.artifacts import job as step
from llmfusion.artifacts import store as artifacts
from llmfusion.artifacts.store import Draft, address_of, draft_folder, manifest_of, publish
from llmfusion.cli import verify
from llmfusion.errors import DamagedError, UserError
from llmfusion.io.digests import canonical
from llmfusion.study.graph import output_of
from tests.project import environment

RESULTS = Path("results")
PIVOT, CODE, SFT, KD = (f"models/{name}" for name in ("base/pivot", "base/code", "trained/sft", "trained/kd-code"))
CACHE, MIX, GENERATED = "teachers/base/code/student", "data/mix/student", "data/generated/base/code/student"
SHARD = "teachers/shards/base/code/student/1-of-2"  # reads model and mix; the cache is gathered from it
WEIGHT = "model.layers.1.mlp.up_proj.weight"
Copy = dict[str, Path]  # files of the finished study by their names below its folder
Spoil = Callable[[Path], object]  # changes the files of a folder
Cases = dict[str, tuple[Callable[[], Spoil], str]]  # how to spoil it, and what must be told (a pattern)
Make = Callable[..., str | None]  # runs a step, see made_by_its_step


@pytest.fixture(scope="module")
def originals(made: Path) -> Copy:
    study = made / "runs/tiny"
    return {
        str(p.relative_to(study)): p
        for name in ("results", "logs")
        for p in sorted((study / name).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, originals: Copy) -> Path:
    place = tmp_path_factory.mktemp("damage") / "runs/tiny"
    put_back(originals, place, 0)
    return place


@pytest.fixture
def study(originals: Copy, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the finished study, as the working directory; damage it at will."""
    monkeypatch.chdir(place)
    before, began = signal.getsignal(signal.SIGTERM), time.time()
    yield place
    signal.signal(signal.SIGTERM, before)
    put_back(originals, place, began - 1)


def put_back(originals: Copy, place: Path, since: float) -> None:
    """Make a copy, or undo what was done to it since a time."""
    for folder, folders, names in os.walk(place, topdown=False):
        for path in (f"{folder}/{name}" for name in names + folders):
            if os.path.isdir(path) and not os.path.islink(path):
                with suppress(OSError):
                    os.rmdir(path)  # if nothing is in it
            elif os.path.relpath(path, place) not in originals:
                os.unlink(path)
    for name, original in originals.items():
        target = place / name
        if not target.exists() or (target.stat().st_ctime > since and target.read_bytes() != original.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, target)


# ------------------------------------------------------------------------------------------------ what hashes see
KINDS = ("dataset", "tasks", "mix", "generated", "base", "trained", "merged", "teachers", "answers", "scores", "tables")
SINGLE = ("scores", "tables")  # no folders of their own: other artifacts lie beside them


def kind_of(manifest: Path) -> str:
    parts = address_of(manifest).split("/")
    if address_of(manifest).startswith(artifacts.SHARDS):
        return "shards"  # their files have become the cache's, which is what readers read
    return parts[1] if parts[0] in ("data", "models") else parts[0]


def manifests() -> list[Path]:
    """The manifest of every artifact in the working directory."""
    found = (
        p for p in RESULTS.rglob("*.json") if p.name == "manifest.json" or p.parts[1] == "scores" or p.parent == RESULTS
    )
    return sorted(p for p in found if not p.name.endswith("provenance.json"))


def files_of(manifest: Path) -> list[Path]:
    """Everything a reader of an artifact relies on: its files and the manifest itself."""
    return [*(manifest.parent / name for name in json.loads(manifest.read_text())["files"]), manifest]


def flip(path: Path, rng: random.Random) -> Path:
    content, bit = bytearray(path.read_bytes()), rng.randrange(8 * path.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path


def zero_tail(path: Path, rng: random.Random) -> Path:
    """A hole at the end, as a crash leaves it behind."""
    size = path.stat().st_size
    os.truncate(path, size - rng.randint(1, min(size, 4096)) // 2 - 1)
    os.truncate(path, size)
    return path


def shorten(path: Path, rng: random.Random) -> Path:
    os.truncate(path, path.stat().st_size - 1)
    return path


def empty(path: Path, rng: random.Random) -> Path:
    os.truncate(path, 0)
    return path


def remove(path: Path, rng: random.Random) -> Path:
    path.unlink()
    return path


def add(path: Path, rng: random.Random) -> Path:
    """One file more than the manifest lists."""
    other = path.with_name(
        rng.choice(
            ["pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json", "modeling.py", "more.jsonl"]
        )
    )
    other.write_bytes(b"{}")
    return other


DAMAGES = {damage.__name__: damage for damage in (flip, zero_tail, shorten, empty, remove, add)}
PAIRS = [(kind, name) for kind in KINDS for name in DAMAGES if not (name == "add" and kind in SINGLE)]


@contextmanager
def damaged(path: Path, damage: Callable[[Path, random.Random], Path], seed: object) -> Iterator[Path]:
    """Damage a file under its old times, and mend it afterwards; gives the file that a message must name."""
    content, dates = path.read_bytes(), path.stat()
    at = damage(path, random.Random(f"{damage.__name__} {path} {seed}"))
    if path.exists():
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert at != path or not path.exists() or path.read_bytes() != content
    yield at
    at.unlink(missing_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))


def told_of(name: str, at: Path, content: bytes, manifest: Path) -> str:
    """What the message must say besides the file: what was expected, what was found."""
    if name == "add":
        return f"not in {manifest}"
    if at == manifest:
        return (
            "is not there"
            if name == "remove"
            else "is not JSON|.*edited or damaged.*expected .* found |is no manifest of this project"
        )
    if name == "remove":
        return f"is missing: expected a file of {len(content)} bytes"
    if name in ("shorten", "empty"):
        return f"has {len(content) - 1 if name == 'shorten' else 0} bytes, expected {len(content)}"
    return f"damaged: expected sha256 {hashlib.sha256(content).hexdigest()}, found {hashlib.sha256(at.read_bytes()).hexdigest()}"


def assert_told(message: str, name: str, at: Path, content: bytes, manifest: Path) -> None:
    again = "" if name == "remove" and at == manifest else " -f"
    remedy = "move it away" if name == "add" else re.escape(f"snakemake {manifest}{again}")
    assert re.match(rf"{re.escape(str(at))}: ({told_of(name, at, content, manifest)}).*{remedy}$", message), message


def refuse_by_reader_and_verify(
    path: Path, manifest: Path, name: str, seed: object, capsys: pytest.CaptureFixture[str]
) -> None:
    content = path.read_bytes()
    with damaged(path, DAMAGES[name], seed) as at:
        with pytest.raises(DamagedError) as caught:
            artifacts.read(manifest)
        assert_told(str(caught.value), name, at, content, manifest)
        target = RESULTS / "table2.json" if at == RESULTS / "table2.csv" else RESULTS / "table2.csv"
        assert verify.main([str(target)]) == 1
        assert f"mismatch: {caught.value}" in capsys.readouterr().err


def test_the_kinds_below_are_all_there_are_and_no_file_goes_unhashed(study: Path) -> None:
    assert {kind_of(m) for m in manifests()} == {*KINDS, "shards"}
    hashed = {file for manifest in manifests() for file in files_of(manifest)}
    of_the_run = {RESULTS / "cost.csv"}  # what jobs took is no artifact, as provenance is none
    assert {
        p for p in RESULTS.rglob("*") if p.is_file() and not p.name.endswith("provenance.json")
    } == hashed | of_the_run
    assert verify.main(["results/table2.csv"]) == 0


@pytest.mark.parametrize("scope", ["one", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_damage_to_any_file_is_refused_by_its_reader_and_by_verify(
    study: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, scope: str
) -> None:
    cases = [(file, m) for m in manifests() if kind_of(m) == kind for file in files_of(m)]
    rng = random.Random(f"{kind} {name}")
    for file, manifest in cases if scope == "all" else rng.sample(cases, min(2, len(cases))):
        refuse_by_reader_and_verify(file, manifest, name, scope, capsys)
    assert verify.main(["results/table2.csv"]) == 0  # every mend was one


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_single_bit_of_a_manifest_counts(study: Path, kind: str) -> None:
    manifest = next(m for m in manifests() if kind_of(m) == kind)
    content = manifest.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(changed)
        with pytest.raises(DamagedError):
            artifacts.read(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flipped_after_its_hash_was_remembered_is_seen(
    study: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(artifacts, "REMEMBER_BYTES", 1)
    for manifest in [m for m in manifests() if kind_of(m) == kind]:
        artifacts.read(manifest)
        for file in files_of(manifest)[:-1]:
            with (
                damaged(file, flip, "remembered"),
                pytest.raises(DamagedError, match=f"^{file}: damaged: expected sha256"),
            ):
                artifacts.read(manifest)
    assert len(list(Path("work/verified").glob("*.json"))) == sum(
        len(files_of(m)) - 1 for m in manifests() if kind_of(m) == kind
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda note: b"[]",
        lambda note: b'"x"',
        lambda note: b"",
        lambda note: note.replace(b'"sha256":"', b'"sha256":"0'),
    ],
)
def test_a_sound_file_is_not_refused_for_a_damaged_memory(
    study: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(artifacts, "REMEMBER_BYTES", 1)
    manifest = RESULTS / PIVOT / "manifest.json"
    artifacts.read(manifest)
    for note in Path("work/verified").iterdir():
        note.write_bytes(spoil(note.read_bytes()))
    artifacts.read(manifest)


def test_a_linked_folder_is_one_file_too_many(study: Path) -> None:
    manifest = RESULTS / PIVOT / "manifest.json"
    (manifest.parent / "additional_chat_templates").symlink_to(study / "logs")
    with pytest.raises(DamagedError, match=r"additional_chat_templates: not in .*move it away"):
        artifacts.read(manifest)


# ------------------------------------------------------------------------------------------------ what hashes cannot see
def remake(address: str, change: Spoil = lambda folder: None, **facts: Any) -> Path:
    """Change an artifact and write an honest manifest over it, as a faulty program would have done."""
    manifest = manifest_of(Path(output_of(address)))
    body = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "sha256"}
    if manifest.name == "manifest.json":
        change(manifest.parent)
        files = [p for p in sorted(manifest.parent.iterdir()) if p.name not in ("manifest.json", "provenance.json")]
        body["files"] = {
            p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files
        }
    body["facts"] = {k: v for k, v in (body["facts"] | facts).items() if v is not ...}
    own = hashlib.sha256(canonical(body).encode()).hexdigest()
    manifest.write_text(json.dumps({**body, "sha256": own}, indent=1, sort_keys=True) + "\n")
    artifacts.read(manifest)
    return manifest.parent


def command_of(address: str) -> list[str]:
    """The words behind ``python -m`` that made an artifact, from its log."""
    first = next(
        line for line in Path(f"logs/{address}.log").read_text().splitlines() if line.startswith("# python -m ")
    )
    return shlex.split(first)[3:]


def take_away(address: str) -> None:
    """Remove a finished artifact, so that a step has it to make."""
    output = Path(output_of(address))
    if output.name == "manifest.json":
        shutil.rmtree(output.parent)
        return
    for suffix in (output.suffix, ".json", ".md", ".provenance.json"):
        output.with_suffix(suffix).unlink(missing_ok=True)


@pytest.fixture
def made_by_its_step(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    """Runs the step that makes an artifact, in this process; None if it was made, else the message, with nothing left behind."""

    def make(address: str, **changed: Any) -> str | None:
        take_away(address)
        name, *words = command_of(address)
        if changed:
            at = words.index("--spec") + 1
            spec = json.loads(words[at])
            spec[next(key for key in ("run", "merge", "base") if key in spec)].update(changed)
            words[at] = canonical(spec)
        monkeypatch.setattr("sys.argv", [name, *words])
        status = step.run(name.removeprefix("llmfusion."), importlib.import_module(name).build)
        told = capsys.readouterr().err
        if status == 0:
            return None
        assert status == 1
        assert_nothing_is_left_of(address)
        return told[told.index("error: ") + 7 :]

    return make


def assert_nothing_is_left_of(address: str) -> None:
    output = Path(output_of(address))
    assert not output.exists()
    assert not manifest_of(output).exists()
    assert [p for p in RESULTS.rglob(".*") if "draft" in p.name or "tmp" in p.name] == []
    assert not (Path("work") / address / "lease").exists()


def tensors(change: Callable[[dict[str, Any]], object], name: str = "model.safetensors") -> Spoil:
    """A change of a folder's tensors."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(folder / name)
        change(content)
        save_file(
            {key: tensor.contiguous() for key, tensor in content.items()}, folder / name, metadata={"format": "pt"}
        )

    return spoil


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].__setitem__(index, value)


def cast(name: str, dtype: str) -> Callable[[dict[str, Any]], None]:
    import torch

    return lambda content: content.update({name: content[name].to(getattr(torch, dtype))})


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """A change of a file's bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def settings(name: str, **changed: Any) -> Spoil:
    return rewrite(name, lambda content: json.dumps(json.loads(content) | changed).encode())


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change of a safetensors file's header, of the same length."""

    def rewritten(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length])
        change(found)
        return content[:8] + json.dumps(found, separators=(",", ":")).encode().ljust(length) + content[8 + length :]

    return rewritten


class Poison:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def pickled(folder: Path) -> None:
    import torch

    torch.save({"model.norm.weight": Poison()}, folder / "pytorch_model.bin")


def only_pickled(folder: Path) -> None:
    pickled(folder)
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {WEIGHT: "model-00002-of-00002.safetensors", "model.norm.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def own_code(folder: Path) -> None:
    settings("config.json", architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})(
        folder
    )
    (folder / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")


def own_tokenizer(folder: Path) -> None:
    settings(
        "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]}
    )(folder)
    (folder / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")


def only_own_tokenizer(folder: Path) -> None:
    own_tokenizer(folder)
    (folder / "tokenizer.json").unlink()


W = re.escape(WEIGHT)
MODELS: Cases = {
    "missing tensor": (lambda: tensors(lambda t: t.pop(WEIGHT)), rf"model\.safetensors: .*{W} is missing"),
    "extra tensor": (
        lambda: tensors(lambda t: t.update(extra=t[WEIGHT] + 1)),
        r"model\.safetensors: .*extra is not the model's",
    ),
    "another shape": (
        lambda: tensors(lambda t: t.update({WEIGHT: t[WEIGHT][:3]})),
        rf"model\.safetensors: .*{W} is \[3, 64\], expected \[176, 64\]",
    ),
    "a NaN": (lambda: tensors(put(WEIGHT, (5, 6), float("nan"))), rf"model\.safetensors: tensor {W} is not finite"),
    "infinity": (lambda: tensors(put(WEIGHT, (5, 6), float("inf"))), rf"model\.safetensors: tensor {W} is not finite"),
    "minus infinity": (
        lambda: tensors(put(WEIGHT, (175, 63), -float("inf"))),
        rf"model\.safetensors: tensor {W} is not finite",
    ),
    "float64": (
        lambda: tensors(cast(WEIGHT, "float64")),
        rf"model\.safetensors: .*{W} is F64, expected F32 or BF16 or F16",
    ),
    "integers": (lambda: tensors(cast(WEIGHT, "int64")), rf"model\.safetensors: .*{W} is I64, expected"),
    "float8": (lambda: tensors(cast(WEIGHT, "float8_e4m3fn")), rf"model\.safetensors: .*{W} is F8_E4M3, expected"),
    "a head beside the tied one": (
        lambda: tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2})),
        r"model\.safetensors: .*a head of its own, where config\.json ties it",
    ),
    "half a header": (
        lambda: rewrite("model.safetensors", lambda c: c[:200]),
        r"model\.safetensors: no safetensors header",
    ),
    "zeros for a header": (
        lambda: rewrite("model.safetensors", lambda c: bytes(len(c))),
        r"model\.safetensors: no safetensors header",
    ),
    "a header of no JSON": (
        lambda: rewrite("model.safetensors", lambda c: c[:20] + b"\xff" + c[21:]),
        r"model\.safetensors: the header is not JSON",
    ),
    "half the tensors": (
        lambda: rewrite("model.safetensors", lambda c: c[: len(c) // 2]),
        r"model\.safetensors: tensor \S+ ends at byte \d+, the file at \d+",
    ),
    "bytes behind the tensors": (
        lambda: rewrite("model.safetensors", lambda c: c + b"more"),
        r"model\.safetensors: has \d+ bytes, its tensors end at \d+",
    ),
    "offsets that leave a gap": (
        lambda: rewrite("model.safetensors", header(lambda h: h.pop(WEIGHT))),
        r"model\.safetensors: tensor \S+ begins at byte \d+, expected \d+",
    ),
    "a shape that is not its size": (
        lambda: rewrite("model.safetensors", header(lambda h: h[WEIGHT].update(shape=[176, 63]))),
        rf"model\.safetensors: tensor {W}: F32 \[176, 63\] takes 44352 bytes",
    ),
    "a tensor without offsets": (
        lambda: rewrite("model.safetensors", header(lambda h: h[WEIGHT].pop("data_offsets"))),
        rf"model\.safetensors: tensor {W}: the",
    ),
    "pickled weights only": (
        lambda: only_pickled,
        r"base/pivot: has no \.safetensors weights; pickled weights are never read",
    ),
    "a shard the index names": (lambda: lost_shard, r"lists no file 'model-00002-of-00002\.safetensors'"),
    "code of its own": (
        lambda: own_code,
        r"has no class 'OwnForCausalLM'; code from its repository \(auto_map\) is never run",
    ),
    "only a tokenizer of its own": (
        lambda: only_own_tokenizer,
        r"base/pivot: the tokenizer cannot be loaded: ValueError: .*custom code",
    ),
    "another class": (lambda: settings("config.json", architectures=["LlamaConfig"]), "has no class 'LlamaConfig'"),
    "no class": (lambda: settings("config.json", architectures=[None]), "has no class None"),
    "fewer layers than tensors": (
        lambda: settings("config.json", num_hidden_layers=1),
        r"model\.layers\.1\.\S+ is not the model's",
    ),
    "more layers than tensors": (
        lambda: settings("config.json", num_hidden_layers=3),
        r"model\.layers\.2\.\S+ is missing",
    ),
    "a setting of another type": (
        lambda: settings("config.json", hidden_size="wide"),
        "base/pivot: the model cannot be loaded: .*hidden_size",
    ),
    "no heads": (
        lambda: settings("config.json", num_attention_heads=0),
        "base/pivot: the model cannot be loaded: ZeroDivisionError",
    ),
    "quantised weights": (
        lambda: settings("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "base/pivot: the model cannot be loaded: ",
    ),
    "half a config.json": (lambda: rewrite("config.json", lambda c: c[:40]), r"config\.json: expected JSON"),
    "a list for config.json": (
        lambda: rewrite("config.json", lambda c: b"[]"),
        r"config\.json: expected a JSON object, found list",
    ),
    "half a generation_config.json": (
        lambda: rewrite("generation_config.json", lambda c: c[:9]),
        r"generation_config\.json: expected JSON",
    ),
    "half a tokenizer.json": (lambda: rewrite("tokenizer.json", lambda c: c[:999]), r"tokenizer\.json: expected JSON"),
    "half a tokenizer_config.json": (
        lambda: rewrite("tokenizer_config.json", lambda c: c[:9]),
        r"tokenizer_config\.json: expected JSON",
    ),
    "no tokenizer.json": (
        lambda: lambda folder: (folder / "tokenizer.json").unlink(),
        "base/pivot: the tokenizer cannot be loaded",
    ),
    "half a chat template": (
        lambda: rewrite("chat_template.jinja", lambda c: c[:-5]),
        r"base/pivot: the chat template, line \d+: ",
    ),
}


def load(address: str) -> Any:
    from llmfusion.models.loading import load_model, load_tokenizer

    artifact = artifacts.read(RESULTS / address / "manifest.json")
    load_tokenizer(artifact, None)
    return load_model(artifact, "float32")


@pytest.mark.parametrize("case", MODELS)
def test_a_broken_model_with_an_honest_manifest_is_refused_by_file_and_tensor(study: Path, case: str) -> None:
    spoil, told = MODELS[case]
    remake(PIVOT, spoil())
    with pytest.raises(UserError, match=told):
        load(PIVOT)
    assert not Path("ran").exists()
    assert not Path("unpickled").exists()


def test_the_pickle_is_one_that_runs_when_it_is_read(study: Path) -> None:
    import torch

    pickled(study)
    torch.load("pytorch_model.bin", weights_only=False)
    assert Path("unpickled").exists()


NO_TOKENIZER = settings("tokenizer_config.json", tokenizer_class="LlamaForCausalLM")  # tokenizer.json is what counts


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: None,
        pickled,
        tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()})),
        own_tokenizer,
        NO_TOKENIZER,
    ],
)
def test_what_is_sound_loads_and_neither_pickles_nor_code_beside_it_are_read(study: Path, spoil: Spoil) -> None:
    remake(PIVOT, spoil)
    assert not Path("ran").exists()
    assert (
        sum(p.numel() for p in load(PIVOT).parameters())
        == json.loads((RESULTS / PIVOT / "manifest.json").read_text())["facts"]["parameters"]
    )
    assert not Path("unpickled").exists()


USERS = {
    "models/trained/sft": PIVOT,
    CODE: PIVOT,
    SHARD: CODE,
    GENERATED: CODE,
    "answers/trained/sft/all": SFT,
    "models/merged/ta-homogeneous": SFT,
}


@pytest.mark.parametrize("address", USERS)
def test_every_step_that_takes_a_model_refuses_a_nan_in_it(made_by_its_step: Make, address: str) -> None:
    remake(USERS[address], tensors(put(WEIGHT, (0, 0), float("nan"))))
    assert re.match(
        rf"results/{USERS[address]}/model\.safetensors: tensor {W} (is not finite|holds a NaN)",
        made_by_its_step(address) or "accepted",
    )


MERGES: Cases = {
    "missing tensor": (lambda: tensors(lambda t: t.pop(WEIGHT)), rf"{W} is missing in \S+{SFT}"),
    "extra tensor": (
        lambda: tensors(lambda t: t.update(extra=t[WEIGHT] + 1)),
        rf"extra of \S+{SFT} is not in the pivot",
    ),
    "another shape": (
        lambda: tensors(lambda t: t.update({WEIGHT: t[WEIGHT][:3]})),
        rf"{W} is \[3, 64\] in \S+{SFT} and \[176, 64\] in the pivot",
    ),
    "integers": (lambda: tensors(cast(WEIGHT, "int64")), rf"{W} of \S+{SFT} is I64, the pivot's F32"),
    "infinity": (
        lambda: tensors(put(WEIGHT, (5, 6), float("inf"))),
        rf"{SFT}/model\.safetensors: tensor {W} holds a NaN or an infinity",
    ),
    "half a header": MODELS["half a header"],
    "half the tensors": MODELS["half the tensors"],
    "offsets that leave a gap": MODELS["offsets that leave a gap"],
    "a shape that is not its size": MODELS["a shape that is not its size"],
    "a tensor without offsets": MODELS["a tensor without offsets"],
    "pickled weights only": (
        lambda: only_pickled,
        rf"{SFT}: has no \.safetensors weights; pickled weights are never read",
    ),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_broken_parent_is_not_merged(made_by_its_step: Make, case: str) -> None:
    spoil, told = MERGES[case]
    remake(SFT, spoil())
    assert re.search(told, made_by_its_step("models/merged/ta-homogeneous") or "accepted")


def test_a_broken_checkpoint_is_not_staged(made_by_its_step: Make, study: Path) -> None:
    folder = shutil.copytree(study / "results" / PIVOT, study / "given")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    told = made_by_its_step(CODE, kind="path", path=str(folder), license="mit")
    assert re.match(
        rf"\S+/{CODE.replace('code', '')}\S*model\.safetensors: tensor \S+ ends at byte .*truncated", told or "accepted"
    ), told


# ------------------------------------------------------------------------------------------------ what comes out is finite
def test_a_training_whose_last_step_overflows_publishes_nothing(made_by_its_step: Make) -> None:
    told = made_by_its_step("models/trained/sft", steps=1, lr=1e39)
    assert re.search(r"tensor \S+ is not finite in float32; nothing was published", told or "accepted")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_merge_that_overflows_publishes_nothing(made_by_its_step: Make) -> None:
    told = made_by_its_step("models/merged/ta-homogeneous", weight=1e41)
    assert re.search(r"tensor \S+: the merge is not finite in F32; nothing was published", told or "accepted")


def test_weights_that_only_their_rounding_makes_infinite_are_not_saved(study: Path) -> None:
    from llmfusion.models.loading import load_tokenizer, save_model

    model = load(PIVOT)
    model.model.norm.weight.data[3] = 3.4028e38  # finite in float32, beyond the largest number of bfloat16
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is not finite in bfloat16"):
        save_model(model, load_tokenizer(study / "results" / PIVOT, None), study / "saved", "bfloat16")
    assert not (study / "saved").exists()


def test_states_that_overflow_are_not_cached(made_by_its_step: Make) -> None:
    remake(CODE, tensors(lambda t: t["model.norm.weight"].fill_(3e38)))  # every weight finite, not what comes of them
    assert re.match(
        "sample [0-9a-f]{40}: the teacher's states are not finite; nothing was published",
        made_by_its_step(SHARD) or "accepted",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_facts_that_are_not_finite_are_not_published(study: Path, value: float) -> None:
    output = Path("results/models/base/new/manifest.json")
    draft = Draft("models/base/new", "{}", {}, draft_folder(output, "token"), {"sound": 1.0, "loss": {"last": [value]}})
    draft.folder.mkdir(parents=True)
    with pytest.raises(UserError, match="models/base/new: loss: a number that is not finite; nothing was published"):
        publish(draft, output, {})
    assert not output.parent.exists()


# ------------------------------------------------------------------------------------------------ teacher caches
def piece(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return tensors(change, "piece-00000.safetensors")


def head(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return tensors(change, "head.safetensors")


def index(change: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    """A change of the rows of a cache's index."""

    def spoil(folder: Path) -> None:
        rows = pyarrow.parquet.read_table(folder / "index.parquet").to_pylist()
        change(rows)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "index.parquet")

    return spoil


def cut(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({name: content[name][:-1] for name in names})


FIRST, HEAD, INDEX = (
    rf"{CACHE}/{name}" for name in (r"piece-00000\.safetensors", r"head\.safetensors", r"index\.parquet")
)
ALL = ("hidden", "label_id", "label_logprob", "entropy", "logsumexp")
CACHES: Cases = {
    **{
        f"a NaN in {n}": (
            lambda n=n: piece(put(n, (77,), float("nan"))),
            f"{FIRST}: tensor {n} is not finite in the rows of sample [0-9a-f]{{40}}",
        )
        for n in ALL
        if n != "label_id"
    },
    "infinity": (
        lambda: piece(put("hidden", (77, 3), float("inf"))),
        f"{FIRST}: tensor hidden is not finite in the rows of sample",
    ),
    **{
        f"no {n}": (lambda n=n: piece(lambda t: t.pop(n)), f"{FIRST}: tensor {n}: expected .*, found none") for n in ALL
    },
    "a tensor too many": (
        lambda: piece(lambda t: t.update(more=t["entropy"] + 1)),
        f"{FIRST}: tensor more: not part of a teacher cache",
    ),
    "one row too few": (
        lambda: piece(cut(*ALL)),
        rf"{FIRST}: tensor hidden: expected .* \[\d+, 64\], found F32 \[\d+, 64\]",
    ),
    "one state too few": (lambda: piece(cut("hidden")), f"{FIRST}: tensor hidden: expected"),
    "one label too few": (
        lambda: piece(cut("label_id")),
        rf"{FIRST}: tensor label_id: expected I32 \[\d+\], found I32 \[\d+\]",
    ),
    "narrow states": (
        lambda: piece(lambda t: t.update(hidden=t["hidden"][:, :-1])),
        rf"{FIRST}: tensor hidden: expected .* 64\], found F32 \[\d+, 63\]",
    ),
    "integer states": (
        lambda: piece(cast("hidden", "int32")),
        rf"{FIRST}: tensor hidden: expected F32 or BF16 or F16 .*, found I32",
    ),
    "labels of another kind": (
        lambda: piece(cast("label_id", "float32")),
        rf"{FIRST}: tensor label_id: expected I32 .*, found F32",
    ),
    "half a piece's header": (
        lambda: rewrite("piece-00000.safetensors", lambda c: c[:200]),
        f"{FIRST}: no safetensors header",
    ),
    "half a piece": (
        lambda: rewrite("piece-00000.safetensors", lambda c: c[: len(c) // 2]),
        rf"{FIRST}: tensor \S+ ends at byte",
    ),
    "no piece": (
        lambda: lambda folder: (folder / "piece-00000.safetensors").unlink(),
        "lists no file 'piece-00000.safetensors'",
    ),
    "a NaN in the head": (lambda: head(put("weight", (5, 6), float("nan"))), f"{HEAD}: tensor weight is not finite"),
    "no head": (
        lambda: head(lambda t: t.update(other=t.pop("weight"))),
        f"{HEAD}: tensor weight: expected 400 rows of numbers or more, found",
    ),
    "a shorter head": (
        lambda: head(lambda t: t.update(weight=t["weight"][:-1])),
        rf"{HEAD}: tensor weight: expected 400 rows of numbers or more, found \[399, 64\]",
    ),
    "a head of integers": (
        lambda: head(cast("weight", "int32")),
        rf"{HEAD}: tensor weight: expected F32 or BF16 or F16 \[400, 64\], found I32 \[400, 64\]",
    ),
    "a bias of another length": (
        lambda: head(lambda t: t.update(bias=t["weight"][:9, 0])),
        rf"{HEAD}: tensor bias: expected .* \[400\], found F32 \[9\]",
    ),
    "short embeddings": (
        lambda: head(lambda t: t.update(embedding=t["weight"][:9] + 1)),
        rf"{HEAD}: tensor embedding: expected 400 rows of numbers or more, found \[9, 64\]",
    ),
    "narrow embeddings": (
        lambda: head(lambda t: t.update(embedding=t["weight"][:, :9] + 1)),
        rf"{HEAD}: tensor embedding: expected .* \[400, 64\], found F32 \[400, 9\]",
    ),
    "a NaN in the embeddings": (
        lambda: head(lambda t: t.update(embedding=t["weight"] + float("nan"))),
        f"{HEAD}: tensor embedding is not finite",
    ),
    "half a head": (lambda: rewrite("head.safetensors", lambda c: c[:-1]), rf"{HEAD}: tensor weight ends at byte"),
    "a sample too few": (
        lambda: index(lambda rows: rows.pop(7)),
        rf"{INDEX}: expected (\d+) samples as the manifest tells, found \d+",
    ),
    "a sample twice": (
        lambda: index(lambda rows: rows.__setitem__(7, rows[8])),
        rf"{INDEX}: expected \d+ samples .*, found \d+ in \d+ rows",
    ),
    "a sample of another name": (
        lambda: index(lambda rows: rows[7].update(id="another")),
        r"has no rows for sample [0-9a-f]{40}",
    ),
    "no column length": (
        lambda: index(lambda rows: [row.pop("length") for row in rows]),
        rf"{INDEX}, row 0: length: found None; expected id, piece, start, length",
    ),
    "no texts to compare": (
        lambda: index(lambda rows: rows[7].update(response_sha256=None)),
        rf"{INDEX}, row 7: response_sha256: found None",
    ),
    "no segments": (
        lambda: index(lambda rows: rows[7].update(segment_starts=[])),
        rf"{INDEX}, row 7: segment_starts: found \[\]",
    ),
    "a null in the index": (
        lambda: index(lambda rows: rows[7].update(start=None)),
        rf"{INDEX}, row 7: start: found None",
    ),
    "a sample that is too long": (
        lambda: index(lambda rows: rows[-1].update(length=rows[-1]["length"] + 9)),
        rf"{CACHE}/piece-00001\.safetensors: tensor hidden: expected",
    ),
    "a sample that is too short": (
        lambda: index(lambda rows: rows[7].update(length=3)),
        "its cached labels are not the student's",
    ),
    "half an index": (
        lambda: rewrite("index.parquet", lambda c: c[: len(c) // 2]),
        f"{INDEX}: cannot be read as Parquet",
    ),
    "an index of zeros": (
        lambda: rewrite("index.parquet", lambda c: bytes(len(c))),
        f"{INDEX}: cannot be read as Parquet",
    ),
}


def use_cache() -> None:
    """Everything a training takes from the cache: head, embeddings, and the rows of every sample of the mix."""
    from llmfusion.data.chat import encode
    from llmfusion.data.samples import read_jsonl
    from llmfusion.fusion.teacher import CachedTeacher
    from llmfusion.models.loading import load_tokenizer

    tokenizer = load_tokenizer(RESULTS / PIVOT, None)
    source = CachedTeacher("base/code", artifacts.read(RESULTS / CACHE / "manifest.json"), tokenizer, 400, "cpu")
    source.cache.embedding()
    for sample in read_jsonl(RESULTS / MIX / "samples.jsonl"):
        source.batch([sample], [encode(sample, tokenizer, 128).label_ids])  # type: ignore[union-attr]


def test_a_sound_teacher_cache_is_used(study: Path) -> None:
    remake(CACHE)
    use_cache()


@pytest.mark.parametrize("case", CACHES)
def test_a_broken_teacher_cache_is_refused_by_file_and_tensor(study: Path, case: str) -> None:
    spoil, told = CACHES[case]
    remake(CACHE, spoil())
    with pytest.raises(UserError, match=told):
        use_cache()


@pytest.mark.parametrize("case", ["a NaN in hidden", "no entropy", "a sample too few", "a NaN in the head"])
def test_no_training_begins_or_goes_on_with_a_broken_teacher_cache(made_by_its_step: Make, case: str) -> None:
    spoil, told = CACHES[case]
    remake(CACHE, spoil())
    assert re.search(told, made_by_its_step(KD) or "accepted")


def test_a_fact_that_a_step_needs_and_the_manifest_lacks_is_named(made_by_its_step: Make) -> None:
    remake(CACHE, rows_of_head=...)
    told = made_by_its_step(KD) or "accepted"
    assert told.startswith(f"results/{CACHE}: the manifest of {CACHE} says nothing of 'rows_of_head'")


# ------------------------------------------------------------------------------------------------ samples, items, answers, scores
def line(number: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """A change of one line of a file, counted from 1."""

    def rewritten(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        return b"".join(lines)

    return rewritten


def row(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def rewritten(content: bytes) -> bytes:
        found = json.loads(content)
        change(found)
        return json.dumps(found, sort_keys=True).encode() + b"\n"

    return rewritten


SAMPLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half a line": (lambda c: c[:30] + b"\n", "expected a JSON object in UTF-8"),
    "a hole": (lambda c: bytes(len(c) - 1) + b"\n", "expected a JSON object in UTF-8"),
    "no UTF-8": (
        lambda c: c.replace(b'"role"', b'"r\xffle"'),
        "expected a JSON object in UTF-8: 'utf-8' codec can't decode byte 0xff",
    ),
    "half a surrogate pair": (
        lambda c: c.replace(b'"content": "', b'"content": "\\ud83d'),
        "content: expected text, found half a surrogate pair",
    ),
    "a NaN": (
        row(lambda r: r.update(weight=float("nan"))),
        "expected a JSON object in UTF-8: NaN is no number of JSON",
    ),
    "a list": (lambda c: b"[1]\n", "expected an object, found list"),
    "an empty line": (lambda c: b"\n", "expected a JSON object in UTF-8"),
    "no id": (row(lambda r: r.pop("id")), "id: expected text, found None"),
    "no messages": (row(lambda r: r.pop("messages")), "expected text or a list of messages, found None"),
    "empty messages": (row(lambda r: r.update(messages=[])), r"expected text or a list of messages, found \[\]"),
    "null text": (row(lambda r: r["messages"][1].update(content=None)), "content: expected text, found None"),
    "no role": (row(lambda r: r["messages"][0].pop("role")), "role: expected text, found None"),
    "a question alone": (row(lambda r: r["messages"].pop()), "expected the last message to be the assistant's"),
    "null raw text": (row(lambda r: r.update(text=None)), "text: expected text, found None"),
}


@pytest.mark.parametrize("address", ["data/dataset/chat-code", MIX, GENERATED])
@pytest.mark.parametrize("case", SAMPLES)
def test_a_sample_that_cannot_be_used_is_refused_by_file_and_line(
    made_by_its_step: Make, case: str, address: str
) -> None:
    spoil, told = SAMPLES[case]
    user = {
        "data/dataset/chat-code": "data/mix/code",
        MIX: "models/trained/sft",
        GENERATED: "models/trained/seqkd-code",
    }[address]
    remake(address, rewrite("samples.jsonl", line(5, spoil)))
    assert re.match(rf"results/{address}/samples\.jsonl, line 5: {told}", made_by_its_step(user) or "accepted")


@pytest.mark.parametrize("user", [SHARD, GENERATED, CODE])
def test_every_step_that_takes_a_mix_refuses_a_broken_line_in_it(made_by_its_step: Make, user: str) -> None:
    mix = "data/mix/code" if user == CODE else MIX
    remake(mix, rewrite("samples.jsonl", line(150, lambda c: c[:30] + b"\n")))
    assert re.match(
        rf"results/{mix}/samples\.jsonl, line 150: expected a JSON object", made_by_its_step(user) or "accepted"
    )


def test_a_dataset_without_domains_is_not_mixed(made_by_its_step: Make) -> None:
    remake("data/dataset/chat-code", rewrite("samples.jsonl", line(9, row(lambda r: r.pop("domain")))))
    assert re.match(
        r"\S+chat-code/samples\.jsonl, line 9: domain: expected text, found None",
        made_by_its_step("data/mix/code") or "accepted",
    )


ITEMS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "half a line": ("mmlu", lambda c: c[:30] + b"\n", "expected a JSON object in UTF-8"),
    "a null question": ("mmlu", row(lambda r: r.update(question=None)), "question: expected a value, found null"),
    "no question": (
        "mmlu",
        row(lambda r: r.pop("question")),
        "question: a task of format 'letter' needs str, found None",
    ),
    "no choices": (
        "mmlu",
        row(lambda r: r.pop("choices")),
        "choices: a task of format 'letter' needs list, found None",
    ),
    "an answer beyond the choices": (
        "mmlu",
        row(lambda r: r.update(answer=4)),
        r"answer: expected the number of one of 4 choices \(10 at most\), found 4",
    ),
    "an answer below the choices": (
        "mmlu",
        row(lambda r: r.update(answer=-1)),
        "answer: expected the number of one of 4 choices",
    ),
    "a word for an answer": (
        "mmlu",
        row(lambda r: r.update(answer="C")),
        "answer: a task of format 'letter' needs int, found 'C'",
    ),
    "another number": ("mmlu", row(lambda r: r.update(item=9)), "expected item 4, found 9"),
    "a line lost": ("mmlu", lambda c: b"", "expected item 4, found 5"),
    "no test": ("humaneval", row(lambda r: r.pop("test")), "test: a task of format 'code' needs str, found None"),
    "a null prompt": ("humaneval", row(lambda r: r.update(prompt=None)), "prompt: expected a value, found null"),
}


@pytest.mark.parametrize("case", ITEMS)
def test_a_test_item_that_cannot_be_asked_or_graded_is_refused(made_by_its_step: Make, case: str) -> None:
    task, spoil, told = ITEMS[case]
    remake(f"data/tasks/{task}", rewrite("items.jsonl", line(5, spoil)))
    expected = rf"results/data/tasks/{task}/items\.jsonl, line 5: {told}"
    assert re.match(expected, made_by_its_step(f"scores/trained/sft/{task}") or "accepted")
    with pytest.raises(DamagedError, match=expected):
        asked(task)


def asked(task: str) -> Any:
    """A task as lm-eval is given it."""
    from llmfusion.evaluation.answers import config

    kind = {"mmlu": "letter", "humaneval": "code"}[task]
    return config(task, {"format": kind}, artifacts.read(RESULTS / f"data/tasks/{task}/manifest.json"))


def test_fewer_items_than_were_staged_are_neither_asked_nor_graded(made_by_its_step: Make) -> None:
    assert asked("mmlu")["task"] == "mmlu"
    remake("data/tasks/mmlu", rewrite("items.jsonl", line(24, lambda c: b"")))
    told = r"results/data/tasks/mmlu/items\.jsonl: expected 24 lines as the manifest tells, found 23"
    assert re.match(told, made_by_its_step("scores/trained/sft/mmlu") or "accepted")
    with pytest.raises(DamagedError, match=told):
        asked("mmlu")


def test_no_model_is_asked_a_broken_item(made_by_its_step: Make) -> None:
    remake("data/tasks/humaneval", rewrite("items.jsonl", line(24, row(lambda r: r.pop("entry_point")))))
    assert re.match(
        r"results/data/tasks/humaneval/items\.jsonl, line 24: entry_point: ",
        made_by_its_step("answers/trained/sft/all") or "accepted",
    )


def test_no_mix_is_compared_with_a_broken_item(made_by_its_step: Make) -> None:
    remake("data/tasks/mmlu", rewrite("items.jsonl", line(3, row(lambda r: r.update(question=None)))))
    assert re.match(r"results/data/tasks/mmlu/items\.jsonl, line 3: question: ", made_by_its_step(MIX) or "accepted")


ANSWERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half a line": (line(5, lambda c: c[:30] + b"\n"), ", line 5: expected a JSON object in UTF-8"),
    "a null answer": (line(5, row(lambda r: r.update(answer=None))), ", line 5: answer: expected a value, found null"),
    "no answer": (line(5, row(lambda r: r.pop("answer"))), ", line 5: answer: expected text, found None"),
    "no prompt": (line(5, row(lambda r: r.pop("prompt"))), ", line 5: prompt: expected text, found None"),
    "a number for an answer": (
        line(5, row(lambda r: r.update(answer=3.5))),
        ", line 5: answer: expected text, found 3.5",
    ),
    "a NaN beside it": (
        line(5, row(lambda r: r.update(score=float("nan")))),
        ", line 5: expected a JSON object in UTF-8: NaN is no number",
    ),
    "the answer to another item": (line(5, row(lambda r: r.update(item=11))), ", line 5: expected item 4, found 11"),
    "an answer lost": (line(5, lambda c: b""), ", line 5: expected item 4, found 5"),
    "the last answer lost": (line(24, lambda c: b""), ": expected an answer to each of 24 items, found 23"),
    "an answer too many": (
        lambda c: c + row(lambda r: r.update(item=24))(c.splitlines()[-1]),
        ": expected an answer to each of 24 items, found 25",
    ),
    "no answers": (lambda c: b"", ": expected an answer to each of 24 items, found 0"),
}


@pytest.mark.parametrize("task", ["mmlu", "humaneval"])
@pytest.mark.parametrize("case", ANSWERS)
def test_answers_that_are_not_to_the_items_are_not_scored(made_by_its_step: Make, case: str, task: str) -> None:
    spoil, told = ANSWERS[case]
    remake("answers/trained/sft/all", rewrite(f"{task}.jsonl", spoil))
    assert re.match(
        rf"results/answers/trained/sft/all/{task}\.jsonl{told}",
        made_by_its_step(f"scores/trained/sft/{task}") or "accepted",
    )


def test_answers_that_do_not_tell_how_they_were_asked_are_not_scored(made_by_its_step: Make) -> None:
    remake("answers/trained/sft/all", tasks={})
    assert re.match(
        "results/answers/trained/sft/all: the manifest does not tell how mmlu was asked",
        made_by_its_step("scores/trained/sft/mmlu") or "accepted",
    )


SCORES: dict[str, tuple[dict[str, Any], str]] = {
    "k above n": ({"k": 25}, "expected k right of n items, found {'k': 25, 'n': 24"),
    "k below 0": ({"k": -1}, "expected k right of n items"),
    "no items": ({"k": 0, "n": 0}, "expected k right of n items"),
    "half an answer right": ({"k": 7.5}, "expected k right of n items"),
    "a null": ({"n": None}, "expected k right of n items"),
    "a score of other answers": ({"score": 99.0}, "expected the score"),
    "another error": ({"stderr": 0.0}, "expected the score"),
    "a word for a score": ({"score": "high"}, "expected the score"),
    "no k": ({"k": ...}, "the manifest of scores/trained/sft/mmlu says nothing of 'k'"),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_score_that_cannot_be_is_in_no_table(made_by_its_step: Make, case: str) -> None:
    facts, told = SCORES[case]
    remake("scores/trained/sft/mmlu", **facts)
    found = made_by_its_step("tables/table2") or "accepted"
    assert told in found
    assert "scores/trained/sft/mmlu" in found


def test_a_score_that_is_not_a_number_cannot_be_written_honestly(made_by_its_step: Make) -> None:
    path = RESULTS / "scores/trained/sft/mmlu.json"
    path.write_text(re.sub(r'"score": [\d.]+', '"score": NaN', path.read_text()))
    found = made_by_its_step("tables/table2") or "accepted"
    assert re.match(
        rf"{path}: its content does not match .*found none: it holds a number that is not finite.*snakemake {path} -f",
        found,
    )


def test_what_is_sound_is_made_again_as_it_was(made_by_its_step: Make) -> None:
    """The refusals above are of the damage: without it the same calls make the same bytes."""
    for address in ("data/mix/code", "models/merged/ta-homogeneous", "scores/trained/sft/mmlu", "tables/table2"):
        before = manifest_of(Path(output_of(address))).read_bytes()
        assert made_by_its_step(address) is None
        assert manifest_of(Path(output_of(address))).read_bytes() == before


# ------------------------------------------------------------------------------------------------ at the command line
COMMANDS = {
    KD: f"{CACHE}/piece-00000.safetensors",
    CODE: "data/mix/code/samples.jsonl",
    "models/merged/ta-homogeneous": f"{SFT}/model.safetensors",
    CACHE: f"{SHARD}/piece-00000.safetensors",
    SHARD: f"{MIX}/samples.jsonl",
    GENERATED: f"{CODE}/model.safetensors",
    "answers/merged/ta-homogeneous/all": "data/tasks/humaneval/items.jsonl",
    "scores/trained/sft/mmlu": "answers/trained/sft/all/mmlu.jsonl",
    "tables/table2": "scores/base/code/mmlu.json",
    MIX: f"{PIVOT}/tokenizer.json",
}


def at_the_command_line(address: str, study: Path) -> subprocess.CompletedProcess[str]:
    """A step as Snakemake starts it, where torch cannot be loaded."""
    (study / "stub/torch").mkdir(parents=True, exist_ok=True)
    (study / "stub/torch/__init__.py").write_text("raise ImportError('torch was loaded')\n")
    source = Path(artifacts.__file__).parents[1]
    words = ["bash", "-c", "exec python -m " + shlex.join(command_of(address))]
    return subprocess.run(
        words,
        env={**environment(), "PYTHONPATH": f"{study}/stub:{source}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("address", COMMANDS)
def test_each_step_refuses_a_flipped_bit_before_it_loads_anything(study: Path, address: str) -> None:
    take_away(address)
    path = RESULTS / COMMANDS[address]
    with damaged(path, flip, "command line"):
        done = at_the_command_line(address, study)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {path}: .*make it again with: snakemake results/\S+\.json -f\n", done.stderr), (
        done.stderr
    )
    assert done.stdout.startswith("# python -m llmfusion.")
    assert_nothing_is_left_of(address)


def test_the_torch_that_cannot_be_loaded_is_one_that_a_step_would_load(study: Path) -> None:
    take_away(CACHE)
    assert "torch was loaded" in at_the_command_line(CACHE, study).stderr
