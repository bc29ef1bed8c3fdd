"""Merging: CPU seconds, memory and exactness against mergekit 0.1.5, in one run.

``python -m benchmarks.merge`` makes seeded bfloat16 checkpoints (Llama shapes, about 105 million and 0.5 billion
parameters, 2 and 4 sources), merges them with this package, with mergekit in a virtual environment of its own (made on
the first run) and with a copy loop that only reads and writes; then every tensor of the smaller merges is compared with
a plain float64 reference. It ends with a line for each claim: goal, measured, held or not. Figures a parameter leave
out the start-up, which is that of merging a model of a few thousand parameters. Takes about 15 minutes and 8 GB of
disk, in a temporary folder; ``--only`` does one part of it.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmfusion.io.safetensors import TensorInfo, layout_of, read_checkpoint_headers, tensor_bytes

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


PARTS = ("small", "large", "exact")


class Cost(NamedTuple):
    """CPU seconds, peak resident and peak anonymous memory in MiB of one process."""

    cpu: float
    resident: float
    anonymous: float


def shapes(width: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama by name."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    parts = {
        "self_attn.q": (width, width),
        "self_attn.k": (width // 4, width),
        "self_attn.v": (width // 4, width),
        "self_attn.o": (width, width),
    }
    parts |= {"mlp.gate": (4 * width, width), "mlp.up": (4 * width, width), "mlp.down": (width, 4 * width)}
    for i in range(layers):
        out |= {f"model.layers.{i}.{name}_proj.weight": shape for name, shape in parts.items()}
        out |= {f"model.layers.{i}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return out | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(folder: Path, size: str, models: int) -> list[Path]:
    """A pivot (values of deviation 0.02) and models around it (deltas of deviation 1e-3), rounded to bfloat16."""
    width, layers, vocabulary = SIZES[size]
    tensors = shapes(width, layers, vocabulary)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    places = [folder / size / name for name in ("pivot", *(f"model{j}" for j in range(models)))]
    layout = layout_of(Path("model.safetensors"), {name: ("BF16", shape) for name, shape in tensors.items()}, None)
    with contextlib.ExitStack() as stack:
        files = []
        for place in places:
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(config))
            files.append(stack.enter_context(open(place / "model.safetensors", "wb")))
            files[-1].write(layout.head)
        for i, shape in enumerate(tensors.values()):
            theta = np.random.default_rng([0, i]).standard_normal(int(np.prod(shape)), np.float32) * np.float32(0.02)
            for j, file in enumerate(files):
                delta = np.random.default_rng([j, i]).standard_normal(theta.size, np.float32) * np.float32(1e-3)
                bits = (theta + delta if j else theta).view(np.uint32)
                file.write(_rounded(bits).tobytes())
    return places


def _rounded(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to bits of bfloat16, to the nearest, ties to even."""
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def cost(command: list[str | Path], environment: dict[str, str] | None = None) -> Cost:
    """Run a command with one thread and measure it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # both are measured as installed, with their bytecode
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=log, stderr=log)
        anonymous = 0
        while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                anonymous = max([anonymous, *(int(line.split()[1]) for line in status if line.startswith("RssAnon"))])
            except OSError:
                pass
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(waited[1])
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))}\n{log.read()[-3000:]}")
    used = waited[2]
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, anonymous / 1024)


def ours(method: str, models: list[Path], out: Path) -> Cost:
    """A merge with this package's command."""
    shutil.rmtree(out, ignore_errors=True)
    pivot, *others = models
    words: list[str | Path] = [
        "--method",
        method,
        "--pivot",
        pivot,
        "--models",
        *others,
        "--out",
        out,
        "--threads",
        "1",
    ]
    options = [f"{key}={value}" for key, value in METHODS[method][1].items()]
    return cost([sys.executable, "-m", "llmfusion", "merge", *words, *(["--set", *options] if options else [])])


def mergekit(kit: Path, method: str, models: list[Path], out: Path) -> Cost:
    """The same merge with mergekit."""
    shutil.rmtree(out, ignore_errors=True)
    name, _, parameters = METHODS[method]
    own = {key: parameters[key] for key in ("weight", "density") if key in parameters}
    rest = {key: value for key, value in parameters.items() if key not in own}
    entries = [{"model": str(models[0])}, *({"model": str(model), "parameters": own} for model in models[1:])]
    config = out.with_suffix(".json")  # JSON is YAML
    content = {
        "merge_method": name,
        "base_model": str(models[0]),
        "models": entries,
        "parameters": rest,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    config.write_text(json.dumps(content))
    return cost([kit / "bin/mergekit-yaml", config, out, "--no-copy-tokenizer"], {"HF_HUB_OFFLINE": "1"})


def kit_in(folder: Path) -> Path:
    """The virtual environment with mergekit, made if it is not there."""
    if not (folder / "bin/mergekit-yaml").exists():
        print(f"installing {MERGEKIT} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", MERGEKIT], check=True)
    return folder


def parameters(model: Path) -> int:
    """How many values a bfloat16 checkpoint has."""
    return sum(info.nbytes // 2 for info in read_checkpoint_headers(model).values())


def least(costs: list[Cost]) -> Cost:
    """Of repeated runs the one that was disturbed least."""
    return min(costs, key=lambda c: c.cpu)


class Claim(NamedTuple):
    """A goal, which is the most (or ``least``) that is allowed, and what was measured."""

    name: str
    goal: float
    measured: float
    least: bool = False

    def __str__(self) -> str:
        held = self.measured >= self.goal if self.least else self.measured <= self.goal
        limit = f"{'>=' if self.least else '<='} {self.goal:<6g}"
        return f"{self.name:56} {limit} {self.measured:10.3g}  {'held' if held else 'NOT HELD'}"


HEAD = (
    "method  sources  parameters   CPU-s  ns/param  floor x   RSS MiB  anonymous MiB "
    "| mergekit CPU-s  ns/param   RSS MiB"
)
Key = tuple[str, str, int]  # method, size, sources


class Figures:
    """What was measured: ``ours`` and ``theirs`` (mergekit's) by method, size and sources, and the start-ups in CPU
    seconds."""

    def __init__(self, folder: Path, kit: Path | None, repeats: int):
        self.folder = folder
        self.kit = kit
        self.repeats = repeats
        self.out = folder / "out"
        self.ours: dict[Key, Cost] = {}
        self.theirs: dict[Key, Cost] = {}
        self.values: dict[str, int] = {}
        tiny = make(folder, "tiny", 2)
        for method in METHODS:
            ours(method, tiny, self.out)  # compiles, if nothing has been merged on this machine
        self.start = least([ours("ta", tiny, self.out) for _ in range(2 * repeats)]).cpu
        self.kit_start = mergekit(kit, "ta", tiny, self.out).cpu if kit else 0.0
        theirs = f", mergekit {self.kit_start:.2f} CPU-s" if kit else ""
        print(f"start-up: ours {self.start:.2f} CPU-s{theirs}", flush=True)

    def measure(self, size: str, models: list[Path], peer: bool = False) -> None:
        """Merge by every method, ours and mergekit in turns, and print a line for each."""
        n = parameters(models[0])
        count = len(models) - 1
        floor = self.floor(models)
        self.values[size] = n
        print(f"\n{HEAD}", flush=True)
        for method in METHODS:
            key = (method, size, count)
            self.ours[key] = least([ours(method, models, self.out) for _ in range(self.repeats)])
            if peer and self.kit and METHODS[method][0]:
                self.theirs[key] = mergekit(self.kit, method, models, self.out)
            print(self._line(key, n, floor), flush=True)
        print(f"floor  {count:8} {n:11,} {floor:7.2f} {floor / n * 1e9:9.1f}", flush=True)

    def _line(self, key: Key, n: int, floor: float) -> str:
        method, _, count = key
        used = self.ours[key]
        each = self.each(key)
        line = (
            f"{method:6} {count:8} {n:11,} {used.cpu:7.2f} {each:9.1f} {each * n / 1e9 / floor:8.1f} "
            f"{used.resident:9.0f} {used.anonymous:14.0f}"
        )
        if theirs := self.theirs.get(key):
            line += f" | {theirs.cpu:14.1f} {(theirs.cpu - self.kit_start) / n * 1e9:9.0f} {theirs.resident:9.0f}"
        return line

    def floor(self, models: list[Path]) -> float:
        """CPU seconds of a loop that only reads and writes."""
        bare = least([cost([sys.executable, "-c", "import numpy"]) for _ in range(self.repeats)]).cpu
        files = [model / "model.safetensors" for model in models]
        command = [sys.executable, "-c", FLOOR, *files, self.folder / "floor"]
        copied = least([cost(command) for _ in range(self.repeats)]).cpu
        (self.folder / "floor").unlink()
        return max(copied - bare, 1e-9)

    def each(self, key: Key) -> float:
        """Our nanoseconds a parameter, without the start-up."""
        return (self.ours[key].cpu - self.start) / self.values[key[1]] * 1e9

    def claims(self) -> Iterator[Claim]:
        """Every claim there are figures for."""
        yield Claim("start-up, CPU s", 1.5, self.start)
        for key in self.ours:
            method, size, count = key
            if count == 2:
                yield Claim(
                    f"{method}, {size}, 2 sources, ns a parameter" + ("" if method == "ta" else " (stretch 17)"),
                    10 if method == "ta" else 25,
                    self.each(key),
                )
            elif (method, size, 2) in self.ours:
                yield Claim(
                    f"{method}, {size}, {count} sources / 2 sources", 2.2, self.each(key) / self.each((method, size, 2))
                )
        for key in self.ours:
            peer = ("sce" if key[0] != "ta" else "ta", *key[1:])
            if peer in self.theirs:
                ratio = self.theirs[peer].cpu / self.ours[key].cpu
                yield Claim(
                    f"mergekit's {peer[0]} / our {key[0]}, CPU s of the process",
                    4 if key[0] == "ta" else 12,
                    ratio,
                    least=True,
                )
        if self.ours:
            yield Claim("peak anonymous memory, MiB", 300, max(found.anonymous for found in self.ours.values()))


def check(models: list[Path], out: Path) -> Iterator[Claim]:
    """Compare every tensor of each method with the plain reference of the tests, given the numbers of selected
    values."""
    sources = [read_checkpoint_headers(model) for model in models]
    for method in METHODS:
        ours(method, models, out)
        rows = json.loads((out / "merge_report.json").read_text())["tensors"]
        results = [_compare(method, row, sources, read_checkpoint_headers(out)[row["tensor"]]) for row in rows]
        differing = sum(differs for differs, _ in results)
        worst = max(error for _, error in results)
        same = len(rows) - differing
        print(f"{method}: {same} of {len(rows)} tensors are bit-identical to the plain reference", flush=True)
        yield Claim(f"{method}, {len(models) - 1} sources, tensors that differ from the reference", 0, differing)
        if worst:
            yield Claim("rsaf, S against two passes in float64, relative", 1e-9, worst)


def _compare(
    method: str, row: dict[str, Any], sources: list[dict[str, TensorInfo]], merged: TensorInfo
) -> tuple[bool, float]:
    """Whether a tensor differs from the plain reference, and the largest relative error of its skewnesses."""
    from tests.unit.merging.test_methods import reference

    theta, *phi = (
        (tensor_bytes(source[row["tensor"]]).view("<u2").astype(np.uint32) << 16).view(np.float32) for source in sources
    )
    deltas = np.stack([values - theta for values in phi])  # (J, n)
    numbers = [int(row[f"k_{j}"]) for j in range(len(phi))] if method == "rsaf" else None
    bits = reference(method, theta, deltas, METHODS[method][1], numbers).view(np.uint32)
    differs = not np.array_equal(_rounded(bits), tensor_bytes(merged).view("<u2"))
    errors = [abs(row[f"S_{j}"] / skewness(theta, delta) - 1) for j, delta in enumerate(deltas)] if numbers else []
    return differs, max(errors, default=0.0)


def skewness(theta: np.ndarray, delta: np.ndarray) -> float:
    """Of the rates of change: two passes, in float64."""
    rates = np.abs(delta.astype(np.float64)) / (np.abs(theta.astype(np.float64)) + 1e-8)
    rates -= rates.mean()
    return float((rates**3).mean() / (rates**2).mean() ** 1.5)


def main() -> None:
    """Measure, and print a line for each claim."""
    parser = argparse.ArgumentParser(description="Merging against mergekit 0.1.5: CPU, memory, exactness.")
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=Path(tempfile.gettempdir()) / "mergekit-venv",
        help="its virtual environment; made if it is not there",
    )
    parser.add_argument("--alone", action="store_true", help="without mergekit")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours, of which the best counts")
    parser.add_argument(
        "--only",
        choices=PARTS,
        nargs="+",
        default=PARTS,
        help="small: 105M parameters; large: 0.5B; exact: 105M against the reference",
    )
    arguments = parser.parse_args()
    kit = None if arguments.alone or "small" not in arguments.only else kit_in(arguments.mergekit)
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as name:
        folder = Path(name)
        checked = []
        figures = Figures(folder, kit, arguments.repeats)
        if {"small", "exact"} & set(arguments.only):
            models = make(folder, "105M", 4)
            for count in (2, 4) if "small" in arguments.only else ():
                figures.measure("105M", models[: count + 1], peer=count == 2)
            if "exact" in arguments.only:
                checked = list(check(models[:3], folder / "out"))
            shutil.rmtree(folder / "105M")
        if "large" in arguments.only:
            models = make(folder, "0.5B", 4)
            figures.repeats = 1  # long enough to be measured once
            for count in (2, 4):
                figures.measure("0.5B", models[: count + 1])
    print("\n" + "\n".join(map(str, (*figures.claims(), *checked))))


if __name__ == "__main__":
    main()
