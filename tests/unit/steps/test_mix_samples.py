import pytest

from llmfusion.data.chat import encode
from llmfusion.data.samples import read_samples, text_of
from llmfusion.errors import UserError
from llmfusion.io.jsonl import write_jsonl
from llmfusion.steps import mix_samples as mix
from tests.unit.stand_ins import artifact, job, question

TEST_QUESTION = "if a train with two engines and five cars leaves the old town at noon when does it arrive"


def stored(tmp_path, name, rows, file="samples.jsonl"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / file, rows)
    return artifact(folder)


def build(tmp_path, spec, inputs, name="job"):
    made = job(tmp_path, {"mix": {"max_length": 64, **spec}}, inputs, name)
    mix.build(made)
    return list(read_samples(made.folder / "samples.jsonl")), made.facts


@pytest.fixture
def inputs(tmp_path, pivot):
    short = [question(f"short{i}", f"Count to {i}.", " ".join(map(str, range(i)))) for i in range(30)]
    mixed = [
        question("test", TEST_QUESTION, "at one"),
        question("foreign", "日本", "日本語"),
        *(question(f"own{i}", f"Count to {i}.", "0") for i in range(5)),
    ]
    return {
        "data/dataset/short": stored(tmp_path, "short", short),
        "data/dataset/mixed": stored(tmp_path, "mixed", mixed),
        "data/dataset/again": stored(tmp_path, "again", short[3:8]),
        "data/tasks/gsm8k": stored(
            tmp_path, "gsm8k", [{"item": 0, "question": TEST_QUESTION, "answer": "1"}], "items.jsonl"
        ),
        "models/base/pivot": pivot,
    }


def test_a_mix_holds_what_was_asked_of_each_dataset_without_repetition(tmp_path, inputs):
    samples, facts = build(tmp_path, {"datasets": {"short": 12, "mixed": 3}}, inputs)
    assert [sum(s["dataset"] == name for s in samples) for name in ("short", "mixed")] == [12, 3]
    assert len({s["id"] for s in samples if s["dataset"] == "short"}) == 12
    assert facts["datasets"]["short"] == {"asked": 12, "visited": 12, "taken": 12, "rejected": {}}
    assert (facts["samples"], facts["max_length"], facts["domains"]) == (15, 64, {"general": 15})


def test_the_seed_decides_which_samples_and_their_order(tmp_path, inputs):
    draws = [
        build(tmp_path, {"datasets": {"short": 12}, **more}, inputs, str(i))[0]
        for i, more in enumerate(({}, {"seed": 42}, {"seed": 43}))
    ]
    assert draws[0] == draws[1]
    assert {s["id"] for s in draws[0]} != {s["id"] for s in draws[2]}
    assert [s["id"] for s in draws[0]] != sorted(s["id"] for s in draws[0])


def test_only_what_every_tokenizer_can_hold_is_taken(tmp_path, inputs, tokenizer):
    limit = 40
    rows = read_samples(tmp_path / "short" / "samples.jsonl")
    fitting = {s["id"] for s in rows if not isinstance(encode(s, tokenizer, limit), str)}
    samples, facts = build(
        tmp_path, {"datasets": {"short": len(fitting)}, "tokenizers": ["base/pivot"], "max_length": limit}, inputs
    )
    assert 0 < len(fitting) < 30
    assert {s["id"] for s in samples} == fitting
    assert facts["datasets"]["short"]["rejected"]["too long (base/pivot)"]["count"] == facts["datasets"]["short"][
        "visited"
    ] - len(fitting)


def test_samples_of_a_test_are_counted_and_removed_only_if_asked(tmp_path, inputs):
    spec = {"datasets": {"mixed": 6}, "against": ["gsm8k"]}
    samples, facts = build(tmp_path, {**spec, "datasets": {"mixed": 7}}, inputs, "counted")
    assert "test" in {s["id"] for s in samples}
    assert facts["overlap"] == {"gsm8k": {"13": 1, "8": 1}}
    samples, facts = build(tmp_path, {**spec, "decontaminate": "remove"}, inputs, "removed")
    assert not [s for s in samples if TEST_QUESTION in text_of(s)]


def test_the_share_of_ascii_characters_is_kept(tmp_path, inputs):
    samples, facts = build(tmp_path, {"datasets": {"mixed": {"up_to": 7}}, "min_ascii": 0.9}, inputs)
    assert "foreign" not in {s["id"] for s in samples}
    assert facts["datasets"]["mixed"]["rejected"] == {"ascii below 0.9": {"count": 1, "first": ["foreign"]}}


def test_a_language_is_told_by_its_words_and_not_by_its_characters(tmp_path, inputs):
    spanish = "Escribe una funcion que sume dos numeros enteros y explica como funciona paso a paso."
    rows = [question("es", spanish, "def f(a, b): return a + b"), question("en", "Add two numbers.", "a + b")]
    inputs["data/dataset/languages"] = stored(tmp_path, "languages", rows)
    assert spanish.isascii()
    samples, facts = build(tmp_path, {"datasets": {"languages": {"up_to": 9}}, "languages": ["en"]}, inputs)
    assert [s["id"] for s in samples] == ["en"]
    assert facts["datasets"]["languages"]["rejected"] == {"language not en": {"count": 1, "first": ["es"]}}


def test_too_few_usable_rows_are_told_for_all_datasets_at_once_with_what_they_were_lost_to(tmp_path, inputs):
    spec = {"against": ["gsm8k"], "decontaminate": "remove", "min_ascii": 0.9}
    with pytest.raises(UserError) as caught:
        build(tmp_path, {**spec, "datasets": {"mixed": 7, "short": 31, "again": 5}}, inputs)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("2 datasets have too few samples for this mix")
    assert "{up_to: NUMBER}" in head
    assert lines == [
        "  mixed: 7 samples asked, 5 of 7 can be used; lost to ascii below 0.9 (1), overlaps a test (1)",
        "  short: 31 samples asked, 30 of 30 can be used; lost to nothing",
    ]


def test_up_to_takes_what_there_is_and_the_mix_tells_how_much(tmp_path, inputs, caplog):
    caplog.set_level("INFO")
    samples, facts = build(tmp_path, {"datasets": {"mixed": {"up_to": 7}, "short": 12}, "min_ascii": 0.9}, inputs)
    assert len(samples) == 18
    drawn = facts["datasets"]["mixed"]
    assert (drawn["asked"], drawn["taken"], drawn["visited"], drawn["up_to"]) == (7, 6, 7, True)
    assert "mixed: 6 samples of up to 7; lost to ascii below 0.9 (1)" in caplog.text
    assert "up_to" not in facts["datasets"]["short"]


def test_up_to_draws_the_same_samples_as_the_exact_number_where_there_are_enough(tmp_path, inputs):
    exact, _ = build(tmp_path, {"datasets": {"short": 12}}, inputs, "exact")
    assert build(tmp_path, {"datasets": {"short": {"up_to": 12}}}, inputs, "up_to")[0] == exact


def test_a_dataset_without_any_usable_sample_is_refused_even_with_up_to(tmp_path, inputs):
    with pytest.raises(UserError, match="mixed: 7 samples asked, 0 of 7 can be used"):
        build(tmp_path, {"datasets": {"mixed": {"up_to": 7}}, "max_length": 2, "tokenizers": ["base/pivot"]}, inputs)


def test_every_tokenizer_that_rejects_a_sample_is_named_with_it(tmp_path, inputs, pivot):
    both = {**inputs, "models/base/other": pivot}
    spec = {"datasets": {"short": {"up_to": 30}}, "tokenizers": ["base/pivot", "base/other"], "max_length": 40}
    _, facts = build(tmp_path, spec, both)
    rejected = facts["datasets"]["short"]["rejected"]
    assert sorted(rejected) == ["too long (base/other)", "too long (base/pivot)"]
    assert rejected["too long (base/other)"] == rejected["too long (base/pivot)"]
    assert all(name.startswith("short") for name in rejected["too long (base/other)"]["first"])


def test_a_source_under_two_names_is_refused_where_a_sample_would_be_there_twice(tmp_path, inputs):
    message = "5 samples are drawn twice, from the datasets again, short, one is short3: give each source under one"
    with pytest.raises(UserError, match=message):
        build(tmp_path, {"datasets": {"short": 30, "again": 5}}, inputs)
