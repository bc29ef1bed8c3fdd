"""Every layout of the paper's mixes through the chat templates of real models: what a reader takes is trained."""

import random

import pytest
import yaml

from llmfusion.data.chat import chat_format, encode
from llmfusion.data.layout import sample_layouts
from tests.project import ROOT
from tests.unit.data.chat_models import NAMES, WITHOUT_SYSTEM, byte_level
from tests.unit.data.test_turns_of_models import SPECIAL, WORDS

STUDY = yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8"))
DATASETS = {name: entry for name, entry in STUDY["datasets"].items() if "layout" in entry}
OF_THE_PAPER = [
    "neutral",
    "llama-3-instruct",
    "llama-3.1-instruct",
    "llama-3.1-short",
    "deepseek-v2",
    "qwen2.5-instruct",
]
CODE = "```python\ndef f(x):\n\n    if x < 2:\n\n        return '<s>'\n\n\n    return f(x - 1)\n```\n"
MATHS = "\n\nWe have $\\frac{1}{2} \\le x$.\n\n#### 42\n\nThe answer is: \\boxed{42} "


def text(rng, *, html=True):
    words = [*WORDS, CODE, MATHS, "User: ", "Assistant: ", "### Instruction:\n", *(SPECIAL if html else [])]
    return "".join(rng.choice(words) for _ in range(rng.randint(1, 12))) + rng.choice(["", "\n", " ", "\n\n"])


def row(layout, columns, rng):
    """A row as the dataset has it, with odd edges and words that templates use."""
    turns = [
        (role, text(rng, html=layout != "chatml")) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")
    ]
    if rng.random() < 0.3 and layout in ("messages", "chatml"):
        turns = [("system", text(rng, html=layout != "chatml")), *turns]
    if rng.random() < 0.2:
        turns.append(("user", "and?"))  # unanswered: a reader cuts it
    if layout == "messages":
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    if layout == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[role], "value": content} for role, content in turns]}
    if layout == "chatml":
        names = {"user": "prompter"}
        whole = "".join(f"<|im_start|>{names.get(role, role)}\n{content}<|im_end|>\n" for role, content in turns)
        return {"text": whole}
    if layout == "clusters":
        samples = [{"input": text(rng), "output": text(rng)} for _ in range(3)]
        return {"cluster": {"samples": samples}, "instruction": rng.choice(["", text(rng)])}
    return {columns["prompt"]: text(rng), columns["response"]: text(rng)}


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_sample_that_a_reader_takes_is_lost_to_a_template(dataset):
    entry = DATASETS[dataset]
    columns = entry.get("columns", {})
    layout = sample_layouts()[entry["layout"]]
    rng = random.Random(dataset)
    taken = 0
    for _ in range(40):
        sample = layout.convert(row(entry["layout"], columns, rng), columns, rng)
        if sample is None:
            continue
        taken += 1
        for name in NAMES:
            encoded = encode(sample, byte_level(name), 10**6)
            if name in WITHOUT_SYSTEM and sample["messages"][0]["role"] == "system":
                assert encoded == "template refuses it"
                continue
            assert not isinstance(encoded, str), (name, encoded, sample)
            turns = chat_format(byte_level(name)).turns(sample["messages"])
            answers = [m["content"] for m in sample["messages"] if m["role"] == "assistant"]
            assert [turn.response.strip() for turn in turns] == [answer.strip() for answer in answers]
    assert taken > 20


def test_no_model_of_the_paper_refuses_a_system_turn():
    assert not set(OF_THE_PAPER) & set(WITHOUT_SYSTEM)
    assert set(OF_THE_PAPER) <= set(NAMES)
    assert {entry["layout"] for entry in DATASETS.values()} == {
        "clusters",
        "messages",
        "conversations",
        "chatml",
        "pair",
    }
