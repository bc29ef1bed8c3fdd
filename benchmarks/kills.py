"""A training that is killed at any moment ends with the same bytes: ``python -m benchmarks.kills [--kills 20]``.

One miniature fine-tuning with dropout is made undisturbed. Then again and again in a folder of its own: ``kill -9`` at
a moment drawn from a fixed seed, and a fresh process that goes on. Every model's manifest, which has the hash of its
weights, must be the undisturbed one's. Exit status 1 if one is not. Takes about five minutes.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import small
from llmfusion import ROOT
from llmfusion.io.digests import canonical

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
DROPOUT = 0.1
STEPS = 400
RUN = {
    "init": "base/pivot",
    "mix": "m",
    "steps": STEPS,
    "batch_size": 8,
    "lr": 1e-2,
    "seed": 3,
    "save_dtype": "float32",
}
SPEC = {"step": "train", "recipe": 1, "run": RUN}
INPUTS = [f"results/{address}/manifest.json" for address in ("data/mix/m", "models/base/pivot")]
OUT = Path("results/models/trained/killed/manifest.json")
# the program itself, but that it saves as often as it can be killed in between
PROGRAM = """
import sys
from llmfusion.cli.main import main
from llmfusion.training import loop
loop.SAVE_SECONDS = 0.3
sys.exit(main(["step", "train_model", *sys.argv[1:]]))
"""


class Killed(NamedTuple):
    """When it was killed (share of the training's time), the step it went on after, whether the bytes are the same."""

    moment: float
    step: int
    same: bool


def start(place: Path) -> subprocess.Popen:
    words = ["--spec", canonical(SPEC), "--out", str(OUT), "--inputs", *INPUTS]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(process: subprocess.Popen, words: str) -> str:
    """What it prints up to a line with these words."""
    output = ""
    for line in process.stdout or ():
        output += line
        if words in line:
            return output
    raise SystemExit(f"ended with {process.wait()} before {words!r}:\n{output[-3000:]}")


def whole(place: Path) -> tuple[bytes, float]:
    """The undisturbed training: its manifest, and seconds from its first step to its last."""
    process = start(place)
    until(process, "step 1/")
    began = time.monotonic()
    until(process, f"step {STEPS}/")
    took = time.monotonic() - began
    if process.wait():
        raise SystemExit("the undisturbed training failed")
    return (place / OUT).read_bytes(), took


def killed(fresh: Path, place: Path, moment: float, seconds: float, expected: bytes) -> Killed:
    """Kill a training after this share of its seconds, and have a fresh process finish it."""
    shutil.copytree(fresh, place)
    process = start(place)
    until(process, "step 1/")
    time.sleep(moment * seconds)
    process.kill()
    if process.wait() != -9 or (place / OUT).exists():
        problem = f"it had ended before it was killed at {moment:.2f} of {seconds:.1f} s"
        raise SystemExit(f"{problem}; is the machine much faster now than a minute ago?")
    again = start(place)
    output, _ = again.communicate()
    went_on = [int(line.split()[4]) for line in output.splitlines() if line.startswith("going on after step")]
    same = again.returncode == 0 and (place / OUT).read_bytes() == expected
    if not same:
        print(f"killed at {moment:.2f}: status {again.returncode}, {output[-2000:]}", flush=True)
    shutil.rmtree(place)
    step = went_on[0] if went_on else 0
    verdict = "the same bytes" if same else "OTHER BYTES"
    print(f"killed at {moment:.2f} of the time, went on after step {step}: {verdict}", flush=True)
    return Killed(moment, step, same)


def main() -> int:
    """Kill, and compare. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    moments = [0.9 * rng.random() for _ in range(arguments.kills)]
    with tempfile.TemporaryDirectory(prefix="llmfusion-kills-") as name:
        fresh = Path(name) / "fresh"
        _, tokenizer, model = small.pieces(fresh, small.samples(64, 4, 40), SHAPE, 300, 256)
        model.config.attention_dropout = DROPOUT  # so that going on needs the random state, too
        small.checkpoint(fresh, "pivot", model, tokenizer)
        expected, seconds = whole(shutil.copytree(fresh, Path(name) / "whole"))
        weights = json.loads(expected)["files"]["model.safetensors"]["sha256"]
        print(f"undisturbed: {STEPS} steps in {seconds:.1f} s; {weights[:16]}", flush=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            tasks = [
                pool.submit(killed, fresh, Path(name) / f"k{i}", moment, seconds, expected)
                for i, moment in enumerate(moments)
            ]
            ends = [task.result() for task in tasks]
    print(f"bit-identical {sum(one.same for one in ends)}/{len(ends)} (goal {len(ends)}/{len(ends)})")
    return int(not all(one.same for one in ends))


if __name__ == "__main__":
    sys.exit(main())
