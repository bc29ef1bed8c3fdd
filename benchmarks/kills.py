"""A training that is killed at any moment ends with the same bytes: ``python -m benchmarks.kills [--kills 20] [--jobs 2]``.

One miniature fine-tuning with dropout is made undisturbed. Then again and again in a folder of its
own: ``kill -9`` at a moment drawn from a fixed seed, and a fresh process that goes on. Every model's manifest, which has the hash of
its weights, must be the undisturbed one's. Exit status 1 if one is not. Takes about five minutes.
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
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "attention_dropout": 0.1,
}  # fmt: skip
SPEC = {
    "step": "train",
    "recipe": 1,
    "run": {
        "init": "base/pivot",
        "mix": "m",
        "steps": 400,
        "batch_size": 8,
        "lr": 1e-2,
        "seed": 3,
        "save_dtype": "float32",
    },
}
OUT = Path("results/models/trained/killed/manifest.json")
# the program itself, but that it saves as often as it can be killed in between
PROGRAM = """
import sys
from llmfusion import step, train
from llmfusion.training import run
run.SAVE_SECONDS = 0.3
sys.exit(step.run("train", train.build))
"""


class Killed(NamedTuple):
    """When it was killed (share of the training's time), the step the fresh process went on after, and whether the bytes are the same."""

    moment: float
    step: int
    same: bool


def start(place: Path) -> subprocess.Popen:
    words = [
        "--spec",
        canonical(SPEC),
        "--out",
        str(OUT),
        "--inputs",
        "results/data/mix/m/manifest.json",
        "results/models/base/pivot/manifest.json",
    ]
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
    said = ""
    for line in process.stdout or ():
        said += line
        if words in line:
            return said
    raise SystemExit(f"ended with {process.wait()} before {words!r}:\n{said[-3000:]}")


def whole(place: Path) -> tuple[bytes, float]:
    """The undisturbed training: its manifest, and seconds from its first step to its last."""
    process = start(place)
    until(process, "step 1/")
    began = time.monotonic()
    until(process, f"step {SPEC['run']['steps']}/")  # type: ignore[index]
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
        raise SystemExit(
            f"it had ended before it was killed at {moment:.2f} of {seconds:.1f} s; is the machine much faster now than a minute ago?"
        )
    again = start(place)
    said, _ = again.communicate()
    went_on = [int(line.split()[4]) for line in said.splitlines() if line.startswith("going on after step")]
    same = again.returncode == 0 and (place / OUT).read_bytes() == expected
    if not same:
        print(f"killed at {moment:.2f}: status {again.returncode}, {said[-2000:]}", flush=True)
    shutil.rmtree(place)
    step = went_on[0] if went_on else 0
    print(
        f"killed at {moment:.2f} of the time, went on after step {step}: {'the same bytes' if same else 'OTHER BYTES'}",
        flush=True,
    )
    return Killed(moment, step, same)


def main() -> int:
    """Kill, and tell. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    moments = [0.9 * draw.random() for _ in range(given.kills)]
    with tempfile.TemporaryDirectory(prefix="llmfusion-kills-") as name:
        fresh = Path(name) / "fresh"
        _, tokenizer, model = small.pieces(fresh, small.samples(64, 4, 40), SHAPE, 300, 256)
        small.checkpoint(fresh, "pivot", model, tokenizer)
        expected, seconds = whole(shutil.copytree(fresh, Path(name) / "whole"))
        print(
            f"undisturbed: {SPEC['run']['steps']} steps in {seconds:.1f} s; {json.loads(expected)['files']['model.safetensors']['sha256'][:16]}",
            flush=True,
        )  # type: ignore[index]
        with ThreadPoolExecutor(given.jobs) as pool:
            tasks = [
                pool.submit(killed, fresh, Path(name) / f"k{i}", moment, seconds, expected)
                for i, moment in enumerate(moments)
            ]
            found = [task.result() for task in tasks]
    print(f"bit-identical {sum(one.same for one in found)}/{len(found)} (goal {len(found)}/{len(found)})")
    return int(not all(one.same for one in found))


if __name__ == "__main__":
    sys.exit(main())
