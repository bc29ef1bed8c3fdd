"""Training with 4 cached teachers against 4 that are run in every step, and against none: time and memory, in one run.

``python -m benchmarks.cache`` makes a student and four teachers of its size (34 million parameters, a vocabulary of
8,192, random weights), captures the teachers over a mix of made-up words, and trains with SFT, with UDF over cached
states and with UDF over the same teachers online. Each runs in a process of its own, with one thread. A step's time is
that of a longer training less that of a shorter one, the least of the repeats: CPU seconds, so that other programs do
not count, or seconds where there is a GPU. Exit status 1 if a goal is missed. Takes three minutes on a quiet machine.
"""

import argparse
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIDDEN_SIZE = 512
SHAPE = {
    "model_type": "llama",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
VOCABULARY, TEACHERS, SAMPLES = 8192, 4, 24
WORDS = (40, 60)  # of a prompt and of a response, on average: 60 % of the tokens are labels
RUN = {"init": "base/student", "mix": "mix", "batch_size": 4, "lr": 1e-4, "seed": 1}
STEPS = (2, 6)
CAPTURE = {"dtype": "float32", "batch_size": 8}
TIME, MEMORY = 0.6, 1.1  # at most: cached against online, and resident memory against SFT's and the heads


def artifact(folder: Path, spec: dict[str, Any], **facts: Any) -> Any:
    """A folder as the artifact that a rule would have made of it."""
    from llmfusion.artifacts.store import Artifact

    files = {path.name: {} for path in sorted(folder.iterdir())}
    return Artifact(
        folder, {"spec": json.dumps(spec), "fingerprint": "", "inputs": {}, "files": files, "facts": facts}, ""
    )


def make_samples() -> list[dict[str, Any]]:
    """Questions and answers in made-up words, frequent and rare ones."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choice(syllables) for _ in range(draw.randint(2, 4))) for _ in range(20_000)]

    def text(mean: int) -> str:
        return " ".join(
            words[int(len(words) * draw.random() ** 3)] for _ in range(draw.randint(mean // 2, mean * 3 // 2))
        )

    turns = [
        [{"role": "user", "content": text(WORDS[0])}, {"role": "assistant", "content": text(WORDS[1])}]
        for _ in range(SAMPLES)
    ]
    vocabulary = [
        {"id": f"w{i}", "domain": "words", "text": " ".join(words[i : i + 100])} for i in range(0, len(words), 100)
    ]
    return [
        *vocabulary,
        *({"id": f"s{i}", "domain": "words", "messages": messages} for i, messages in enumerate(turns)),
    ]


def prepare(folder: Path) -> None:
    """Student, teachers, mix, and a cache of each kind for every teacher; prints the speed of the captures."""
    from llmfusion.io.jsonl import write_jsonl
    from llmfusion.models.loading import save_model
    from llmfusion.models.scratch import make_model, make_tokenizer
    from llmfusion.study.schema.base_models import Architecture, Tokenizer
    from llmfusion.study.schema.settings import Capture
    from llmfusion.teachers.capture import capture

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    of_teachers = [f"{kind}{k}" for kind in ("teacher", "hidden", "online") for k in range(TEACHERS)]
    for name in ("words", "mix", "student", *of_teachers):
        (folder / name).mkdir()
    samples = make_samples()
    write_jsonl(folder / "words/samples.jsonl", samples)
    write_jsonl(folder / "mix/samples.jsonl", samples[-SAMPLES:])
    architecture = Architecture(**SHAPE)
    tokenizer = make_tokenizer(Tokenizer(vocabulary_size=VOCABULARY), folder / "words/samples.jsonl", None)
    assert len(tokenizer) == VOCABULARY
    save_model(make_model(architecture, tokenizer, 0), tokenizer, folder / "student", "float32")
    mix = artifact(folder / "mix", {}, max_length=512, samples=SAMPLES)
    for k in range(TEACHERS):
        facts = save_model(make_model(architecture, tokenizer, 1 + k), tokenizer, folder / f"teacher{k}", "float32")
        teacher = artifact(folder / f"teacher{k}", {}, **facts)
        for kind in ("hidden", "online"):
            made = capture(teacher, mix, folder / f"{kind}{k}", Capture(kind=kind, **CAPTURE), None)
            (folder / f"{kind}{k}.json").write_text(json.dumps(made))
    print(f"{facts['parameters']:,} parameters, {made['rows']:,} label rows in {made['samples']} samples", flush=True)


def load_teachers(folder: Path, kind: str, tokenizer: Any, device: str) -> list[Any]:
    """The teachers as the trainer sees them; none for ``sft``."""
    from llmfusion.fusion.teacher import load_teacher
    from llmfusion.teachers.online import online_source

    teachers: list[Any] = []
    for k in range(TEACHERS if kind != "sft" else 0):
        facts = json.loads((folder / f"{kind}{k}.json").read_text())
        cache = artifact(folder / f"{kind}{k}", {"capture": {**CAPTURE, "kind": kind}}, **facts)
        mix = artifact(folder / "mix", {}, max_length=512, samples=SAMPLES)
        source = online_source(f"t{k}", cache, mix, artifact(folder / f"teacher{k}", {}), device)
        teachers.append(load_teacher(f"t{k}", cache, tokenizer, VOCABULARY, device, training(1, kind).fusion, source))
    return teachers


def training(steps: int, kind: str) -> Any:
    """The options of a training with these teachers."""
    from llmfusion.study.schema.training import TrainedModel

    fused = {"teachers": [f"base/t{k}" for k in range(TEACHERS)], "fusion": {"target": "udf"}}
    return TrainedModel.model_validate({**RUN, "steps": steps, **(fused if kind != "sft" else {})})


def measure(folder: Path, kind: str, repeats: int) -> None:
    """Print seconds a step and peak resident memory in MiB of trainings with these teachers, as JSON."""
    from llmfusion.models.batches import default_device
    from llmfusion.models.loading import load_model, load_tokenizer
    from llmfusion.training.loop import Student, train

    student = artifact(folder / "student", {})
    tokenizer = load_tokenizer(student, None)
    teachers = load_teachers(folder, kind, tokenizer, default_device())
    model = load_model(student, "float32")
    # CPU seconds: other programs on the machine do not count
    clock = time.process_time if default_device() == "cpu" else time.perf_counter
    mix = artifact(folder / "mix", {}, max_length=512, samples=SAMPLES)
    took: dict[int, float] = dict.fromkeys(STEPS, float("inf"))
    for repeat in range(repeats):
        for steps in STEPS:
            run = training(steps, kind)
            state = folder / f"state-{kind}-{repeat}-{steps}"
            began = clock()
            train(Student(model, tokenizer), run, run.fusion, [mix], teachers, state, "")
            took[steps] = min(took[steps], clock() - began)
    seconds = (took[STEPS[1]] - took[STEPS[0]]) / (STEPS[1] - STEPS[0])
    print(json.dumps({"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def alone(*words: str) -> str:
    """Output of one part in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cache", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def compare(folder: Path, repeats: int) -> int:
    """Print the table and the goals. Returns the exit status: 1 if one is missed."""
    log = alone("prepare", str(folder)).splitlines()
    speeds = [float(line.split(": ")[1].split()[0].replace(",", "")) for line in log if line.startswith("chunk ")]
    print(log[-1], f"\ncapture: {max(speeds):,.0f} tokens/s\n", flush=True)
    results = {}
    print(f"{'':24} {'s/step':>8} {'RSS MiB':>8}")
    rows = {"sft": "SFT", "hidden": f"{TEACHERS} cached teachers", "online": f"{TEACHERS} online teachers"}
    for kind, name in rows.items():
        results[kind] = json.loads(alone("measure", str(folder), kind, str(repeats)).splitlines()[-1])
        print(f"{name:24} {results[kind]['seconds']:8.3f} {results[kind]['memory']:8.0f}", flush=True)
    heads = TEACHERS * VOCABULARY * HIDDEN_SIZE * 4 / 2**20
    time_ratio = results["hidden"]["seconds"] / results["online"]["seconds"]
    memory_ratio = results["hidden"]["memory"] / (results["sft"]["memory"] + heads)
    print(f"\ncached against online, time of a step: {time_ratio:.2f}x (goal: {TIME:.2f}x at most)")
    against = f"cached against SFT and {heads:.0f} MiB of heads"
    print(f"{against}, resident memory: {memory_ratio:.2f}x (goal: {MEMORY:.2f}x at most)")
    return int(time_ratio > TIME or memory_ratio > MEMORY)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache",
        description="Cached teachers against online ones: time and memory of a training.",
    )
    parser.add_argument("--repeats", type=int, default=2, help="trainings of each kind, of which the fastest counts")
    if sys.argv[1:2] == ["prepare"]:
        prepare(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["measure"]:
        measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        arguments = parser.parse_args()
        with tempfile.TemporaryDirectory(prefix="cache-benchmark-") as folder:
            return compare(Path(folder), arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
