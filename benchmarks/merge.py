"""Merging: CPU seconds, memory and exactness against mergekit 0.1.5, in one run.

``python -m benchmarks.merge`` makes seeded bfloat16 checkpoints (Llama shapes, about 105 million and 0.5 billion parameters), merges
them with this package, with mergekit in a virtual environment of its own (made on the first run) and with a copy loop that only reads
and writes, and prints a table. Figures a parameter leave out the start-up, which is that of merging a model of a few thousand
parameters. Then every tensor of the smaller merge is compared with a plain float64 reference. Takes about ten minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmfusion.merging.tensors import entries_of, layout_of, raw

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT = "mergekit==0.1.5"
SIZES = {"tiny": (64, 1, 64), "105M": (768, 10, 13800), "0.5B": (1536, 16, 20000)}  # width, layers, vocabulary
METHODS = {
    "ta": ("task_arithmetic", {"weight": 0.5}, {"weight": 0.5}),
    "ties": ("ties", {"density": 0.6}, {"density": 0.6, "weight": 1.0}),
    "sce": ("sce", {"select_scope": "values"}, {"select_topk": 0.1}),
    "rsaf": (None, {}, {}),
}
FLOOR = """
import os, sys
import numpy as np
*sources, target = sys.argv[1:]
maps = [np.memmap(s, np.uint8, "r") for s in sources]
out, scratch = os.open(target, os.O_RDWR | os.O_CREAT), np.empty(1 << 16, np.uint8)
os.truncate(out, maps[0].size)
for at in range(0, maps[0].size, scratch.size):
    for source in reversed(maps):
        part = source[at : at + scratch.size]
        np.copyto(scratch[: part.size], part)
    os.pwrite(out, scratch[: part.size], at)
"""


class Cost(NamedTuple):
    """CPU seconds, peak resident and peak anonymous memory in MiB of one process."""

    cpu: float
    resident: float
    anonymous: float


def shapes(width: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama by name."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    parts = {"self_attn.q": (width, width), "self_attn.k": (width // 4, width), "self_attn.v": (width // 4, width), "self_attn.o": (width, width)}
    parts |= {"mlp.gate": (4 * width, width), "mlp.up": (4 * width, width), "mlp.down": (width, 4 * width)}
    for i in range(layers):
        out |= {f"model.layers.{i}.{name}_proj.weight": shape for name, shape in parts.items()}
        out |= {f"model.layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return out | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(folder: Path, size: str, models: int) -> list[Path]:
    """A pivot (values of deviation 0.02) and models around it (deltas of deviation 1e-3), rounded to bfloat16."""
    width, layers, vocabulary = SIZES[size]
    tensors = shapes(width, layers, vocabulary)
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    places = [folder / size / name for name in ("pivot", *(f"model{j}" for j in range(models)))]
    for j, place in enumerate(places):
        place.mkdir(parents=True)
        layout = layout_of(place / "model.safetensors", {name: ("BF16", shape) for name, shape in tensors.items()}, None)
        (place / "config.json").write_text(json.dumps(settings))
        with open(place / "model.safetensors", "wb") as file:
            file.write(layout.head)
            for i, shape in enumerate(tensors.values()):
                values = np.random.default_rng([0, i]).standard_normal(int(np.prod(shape)), np.float32) * np.float32(0.02)
                if j:
                    values += np.random.default_rng([j, i]).standard_normal(values.size, np.float32) * np.float32(1e-3)
                bits = values.view(np.uint32)
                file.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes())
    return places


def cost(command: list[str | Path], environment: dict[str, str] | None = None) -> Cost:
    """Run a command with one thread and measure it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=log, stderr=log)
        anonymous = 0
        while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            try:
                told = Path(f"/proc/{process.pid}/status").read_text()
                anonymous = max([anonymous, *(int(line.split()[1]) for line in told.splitlines() if line.startswith("RssAnon"))])
            except OSError:
                pass
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(waited[1])
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{log.read()[-3000:]}")
    used = waited[2]
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, anonymous / 1024)


def ours(method: str, models: list[Path], out: Path, *options: str) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    given = [f"{key}={value}" for key, value in METHODS[method][1].items()]
    words: list[str | Path] = ["--method", method, "--pivot", models[0], "--models", *models[1:], "--out", out, "--threads", "1"]
    return cost([sys.executable, "-m", "llmfusion.merge", *words, *(["--set", *given] if given else []), *options])


def mergekit(kit: Path, method: str, models: list[Path], out: Path) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    name, _, parameters = METHODS[method]
    own = {key: parameters[key] for key in ("weight", "density") if key in parameters}
    rest = {key: value for key, value in parameters.items() if key not in own}
    entries = [{"model": str(models[0])}, *({"model": str(model), "parameters": own} for model in models[1:])]
    config = out.with_suffix(".json")  # JSON is YAML
    config.write_text(
        json.dumps({"merge_method": name, "base_model": str(models[0]), "models": entries, "parameters": rest, "dtype": "float32", "out_dtype": "bfloat16"})
    )
    return cost([kit / "bin/mergekit-yaml", config, out, "--no-copy-tokenizer"], {"HF_HUB_OFFLINE": "1"})


def kit_in(folder: Path) -> Path:
    """The virtual environment with mergekit, made if it is not there."""
    if not (folder / "bin/mergekit-yaml").exists():
        print(f"installing {MERGEKIT} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", MERGEKIT], check=True)
    return folder


def parameters(model: Path) -> int:
    return sum((entry.end - entry.start) // 2 for entry in entries_of(model).values())


def least(costs: list[Cost]) -> Cost:
    """Of repeated runs the one that was disturbed least."""
    return min(costs, key=lambda c: c.cpu)


def compare(folder: Path, kit: Path | None, repeats: int) -> dict[str, list[Path]]:
    """Print what every merge costs. Returns the checkpoints by size."""
    sets = {"tiny": make(folder, "tiny", 2), "105M": make(folder, "105M", 4), "0.5B": make(folder, "0.5B", 2)}
    out = folder / "out"
    ours("rsaf", sets["tiny"], out)  # compiles, if nothing has been merged on this machine
    start = least([ours("ta", sets["tiny"], out) for _ in range(repeats)])
    print(f"start-up: ours {start.cpu:.2f} CPU-s", end="")
    theirs_start = mergekit(kit, "ta", sets["tiny"], out) if kit else None
    print(f", mergekit {theirs_start.cpu:.2f} CPU-s" if theirs_start else "", "\n")
    print(
        "method  sources  parameters   CPU-s  ns/param  floor x   RSS MiB  anonymous MiB | mergekit CPU-s  ns/param   RSS MiB | whole process   per parameter"
    )
    two: dict[str, float] = {}
    for size, count in (("105M", 2), ("105M", 4), ("0.5B", 2)):
        models = sets[size][: count + 1]
        n = parameters(models[0])
        bare = cost([sys.executable, "-c", "import numpy"]).cpu
        files = [model / "model.safetensors" for model in models]
        floor = max(least([cost([sys.executable, "-c", FLOOR, *files, folder / "floor"]) for _ in range(repeats)]).cpu - bare, 1e-9)
        (folder / "floor").unlink()
        for method in METHODS:
            found = least([ours(method, models, out) for _ in range(repeats)])
            each = (found.cpu - start.cpu) / n * 1e9
            if size == "105M" and count == 2:
                two[method] = each
            told = f"{method:6} {count:8} {n:11,} {found.cpu:7.2f} {each:9.1f} {each * n / 1e9 / floor:8.1f} {found.resident:9.0f} {found.anonymous:14.0f}"
            peer = mergekit(kit, method, models, out) if kit and theirs_start and METHODS[method][0] and (size, count) == ("105M", 2) else None
            if peer and theirs_start:
                theirs = (peer.cpu - theirs_start.cpu) / n * 1e9
                told += f" | {peer.cpu:14.1f} {theirs:9.0f} {peer.resident:9.0f} | {peer.cpu / found.cpu:12.1f}x {theirs / each:13.1f}x"
            elif count == 4:
                told += f" | {each / two[method]:.2f} times the figure of 2 sources"
            print(told, flush=True)
        print(f"floor  {count:8} {n:11,} {floor:7.2f} {floor / n * 1e9:9.1f}", flush=True)
    return sets


def check(models: list[Path], out: Path) -> None:
    """Compare every tensor of each method with the plain reference of the tests, given the numbers of selected values."""
    from tests.unit.test_merge_methods import reference

    sources = [entries_of(model) for model in models]
    for method in METHODS:
        ours(method, models, out)
        merged, rows = entries_of(out), {row["tensor"]: row for row in json.loads((out / "merge_report.json").read_text())["tensors"]}
        differing, worst = 0, 0.0
        for name, row in rows.items():
            theta, *phi = ((raw(source[name]).view("<u2").astype(np.uint32) << 16).view(np.float32) for source in sources)
            deltas = np.stack([values - theta for values in phi])
            numbers = [int(row[f"k_{j}"]) for j in range(len(phi))] if method == "rsaf" else None
            bits = reference(method, theta, deltas, METHODS[method][1], numbers).view(np.uint32)
            differing += not np.array_equal(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2"), raw(merged[name]).view("<u2"))
            if numbers:
                for j, delta in enumerate(deltas.astype(np.float64)):
                    rates = np.abs(delta) / (np.abs(theta.astype(np.float64)) + 1e-8)
                    rates -= rates.mean()
                    skewness = (rates**3).mean() / (rates**2).mean() ** 1.5
                    worst = max(worst, abs(row[f"S_{j}"] / skewness - 1))
        told = f"; S within {worst:.1e} of two passes in float64" if method == "rsaf" else ""
        print(f"{method}: {len(rows) - differing} of {len(rows)} tensors are bit-identical to the plain reference{told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merging against mergekit 0.1.5: CPU, memory, exactness.")
    parser.add_argument("--mergekit", type=Path, default=Path(tempfile.gettempdir()) / "mergekit-venv", help="its virtual environment; made if it is not there")
    parser.add_argument("--alone", action="store_true", help="without mergekit")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours, of which the best counts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as folder:
        sets = compare(Path(folder), None if given.alone else kit_in(given.mergekit), given.repeats)
        print()
        check(sets["105M"][:3], Path(folder) / "out")


if __name__ == "__main__":
    main()
