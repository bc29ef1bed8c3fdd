"""What lm-eval is given, and what comes back from a small model."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import UserError
from llmfusion.evaluation.answers import ask, config, with_shots
from llmfusion.io.jsonl import read_jsonl, write_jsonl
from llmfusion.study.schema.data import TaskPrompt
from tests.unit.stand_ins import artifact

ITEMS: dict[str, dict[str, Any]] = {
    "letter": {"item": 0, "question": "Which?", "choices": ["red", "blue"], "answer": 1},
    "number": {"item": 0, "question": "2 + 3?", "answer": "5"},
    "boxed": {"item": 0, "question": "Half?", "answer": "1/2"},
    "code": {"item": 0, "prompt": "def f(x):\n", "test": "t", "entry_point": "f"},
}
PROMPTS = {"letter": "Which?\nA. red\nB. blue", "number": "2 + 3?", "boxed": "Half?", "code": "def f(x):"}
TARGETS = {"letter": "B", "number": "5", "boxed": "1/2", "code": "f"}


def staged(folder: Path, items: list[dict[str, Any]], shots: list[dict[str, Any]] | None = None) -> Artifact:
    folder.mkdir(exist_ok=True)
    facts = {"items": write_jsonl(folder / "items.jsonl", items)}
    if shots is not None:
        facts["shots"] = write_jsonl(folder / "shots.jsonl", shots)
    return artifact(folder, **facts)


@pytest.mark.parametrize("name", ITEMS)
def test_the_configuration_of_each_format(tmp_path: Path, name: str) -> None:
    made = config("quiz", TaskPrompt(format=name, max_new_tokens=7), staged(tmp_path, [ITEMS[name]]))
    assert made.pop("doc_to_text")(ITEMS[name]) == PROMPTS[name]
    assert made.pop("doc_to_target")(ITEMS[name]) == TARGETS[name]
    assert list(made.pop("custom_dataset")()["test"]) == [ITEMS[name]]
    assert repr(sorted(made.items())) == repr(
        [
            ("generation_kwargs", {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 7}),
            ("metadata", {"version": 1.0}),
            ("num_fewshot", 0),
            ("output_type", "generate_until"),
            ("task", "quiz"),
            ("test_split", "test"),
        ]
    )


def test_a_task_has_a_prompt_of_its_own_and_shots_before_it(tmp_path: Path) -> None:
    task = TaskPrompt(format="number", shots=1, prompt="Q: {{ question }}")
    shots = [{"item": 0, "question": "1 + 1?", "answer": "2"}]
    made = config("quiz", task, staged(tmp_path, [ITEMS["number"]], shots))
    [item] = made["custom_dataset"]()["test"]
    assert made["doc_to_text"](item) == "Q: 1 + 1?\n2\n\nQ: 2 + 3?"


def test_shots_are_the_first_of_the_items_subject_with_their_solutions() -> None:
    examples = [
        {"q": "a1", "a": "1", "subject": "a"},
        {"q": "b1", "a": "2", "subject": "b"},
        {"q": "a2", "a": "3", "subject": "a", "solution": "worked"},
        {"q": "a3", "a": "4", "subject": "a"},
    ]
    [item] = with_shots([{"q": "x", "subject": "a"}], examples, 2, "{{ q }}", "{{ a }}")
    assert item["shots"] == "a1\n1\n\na2\nworked\n\n"
    with pytest.raises(UserError, match="2 shots asked, 1 there for subject 'b'"):
        with_shots([{"q": "x", "subject": "b"}], examples, 2, "{{ q }}", "{{ a }}")


def test_a_question_is_asked_with_the_ids_that_stand_before_an_answer_in_training(
    tmp_path: Path, pivot: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the template's own generation prompt is another, and where the question writes out a special token."""
    from llmfusion.data.chat import encode
    from llmfusion.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(pivot, None)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    texts = ["What is 1 plus 2?", "What does <|end|> mean?", "12 apples"]
    items = [{"item": i, "question": text, "answer": "5"} for i, text in enumerate(texts)]
    model = load_model(pivot, "float32")
    asked: list[list[int]] = []
    generate = model.generate

    def spy(input_ids: Any, attention_mask: Any, **options: Any) -> Any:
        asked.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", spy)
    (tmp_path / "out").mkdir()
    tasks = {"quiz": TaskPrompt(format="number", max_new_tokens=4)}
    ask(model, tokenizer, tasks, {"quiz": staged(tmp_path / "quiz", items)}, 2, tmp_path / "out")
    expected = []
    for text in texts:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
        encoded = encode({"messages": messages}, tokenizer, 99)
        assert not isinstance(encoded, str)
        expected.append(list(encoded.ids[: -len(encoded.label_ids)]))
        assert expected[-1].count(0) == 1
    assert sorted(asked) == sorted(expected)
    stored = [row["prompt"] for row in read_jsonl(tmp_path / "out/quiz.jsonl")]
    assert stored == [f"user: {text}<|end|>assistant: " for text in texts]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("{{ question }}{{ 'a' * 10**10 }}", "tasks.quiz.prompt, line 1: it does more work"),
        ("{{ question.__class__ }}", "tasks.quiz.prompt, line 1: it reads '__class__'"),
        ("a\n{{ question[9].upper() + 1 }}", "tasks.quiz.prompt, line 2"),
    ],
)
@pytest.mark.parametrize("shots", [0, 1])
def test_a_prompt_that_fails_or_does_too_much_is_named_with_its_line(
    tmp_path: Path, prompt: str, error: str, shots: int
) -> None:
    task = TaskPrompt.model_construct(format="number", shots=shots, prompt=prompt, max_new_tokens=4)
    data = staged(tmp_path, [ITEMS["number"]], [ITEMS["number"]])
    with pytest.raises(UserError, match=error):
        config("quiz", task, data)["doc_to_text"]({**ITEMS["number"], "shots": ""})


def test_every_item_is_asked_once_and_answered_in_order(tmp_path: Path, pivot: Artifact) -> None:
    from llmfusion.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(pivot, None)
    items = [{"item": i, "question": f"What is {i} plus {10 * i}?", "answer": "5"} for i in range(3)]
    tasks = {"quiz": TaskPrompt(format="number", max_new_tokens=4), "code": TaskPrompt(format="code", max_new_tokens=4)}
    data = {"quiz": staged(tmp_path / "quiz", items), "code": staged(tmp_path / "code", [ITEMS["code"]])}
    (tmp_path / "out").mkdir()
    facts = ask(load_model(pivot, "float32"), tokenizer, tasks, data, 2, tmp_path / "out")
    rows = list(read_jsonl(tmp_path / "out/quiz.jsonl"))
    assert [row["item"] for row in rows] == [0, 1, 2]
    assert [items[i]["question"] in rows[i]["prompt"] for i in range(3)] == [True] * 3
    assert facts["tasks"]["quiz"] == {"items": 3, "shots": 0, "format": "number", "format_version": 1.0}
    assert json.dumps(facts["tasks"]["code"]["format_version"]) == "1.0"
    limited = {"quiz": TaskPrompt(format="number", max_new_tokens=4, limit=2)}
    facts = ask(load_model(pivot, "float32"), tokenizer, limited, data, 2, tmp_path / "out")
    assert facts["tasks"]["quiz"]["items"] == 2
    half = list(read_jsonl(tmp_path / "out/quiz.jsonl"))
    assert [(row["item"], row["prompt"], row["answer"]) for row in half] == [
        (number, rows[of]["prompt"], rows[of]["answer"]) for number, of in enumerate((0, 1))
    ]
    with pytest.raises(UserError, match="task quiz: max_new_tokens 9000 fill the model's 512 positions"):
        ask(
            load_model(pivot, "float32"),
            tokenizer,
            {"quiz": TaskPrompt(format="number", max_new_tokens=9000)},
            data,
            2,
            tmp_path,
        )
