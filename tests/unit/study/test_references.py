"""Checks between sections, on small parsed studies: what is accepted, and what a fault elsewhere must not hide."""

from collections.abc import Callable
from typing import Any

import pytest

from llmfusion.study.load import _parse, _valid_entries
from llmfusion.study.references import Declared, problems
from llmfusion.study.schema.study import Study
from tests.unit.mini_study import small

Change = Callable[[dict[str, Any]], object]


def found(change: Change) -> list[tuple[str, str]]:
    data = small()
    change(data)
    study, _ = _parse(data)
    return sorted({(".".join(map(str, p.key)), p.text) for p in problems(Declared(data, _valid_entries(data, study)))})


def trained(name: str, **keys: Any) -> Change:
    return lambda data: (
        data["models"]["trained"]
        .setdefault(name, {"init": "base/pivot", "mix": "student", "steps": 1, "lr": 0.1})
        .update(keys)
    )


def merged(name: str, **keys: Any) -> Change:
    return lambda data: data["models"]["merged"].setdefault(name, {"pivot": "base/pivot", "method": "sce"}).update(keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: None,
        trained("uni", teachers=["base/code", "base/math"], fusion={"target": "udf"}),
        trained("chain", init="trained/sft"),
        trained("from-merge", init="merged/ta-homogeneous", teachers=["base/code"], fusion={"target": "kd"}),
        merged("again", parents=["merged/ta-homogeneous", "trained/kd-code"]),
        merged("base-parents", parents=["base/code", "base/math"]),
    ],
)
def test_what_fits_together_is_accepted(change: Change) -> None:
    assert found(change) == []


def top(change: Any = lambda data: None) -> Any:
    def both(data: dict) -> None:
        data["capture"] = {"kind": "topk", "k": 10}
        change(data)

    return both


def test_the_k_most_likely_tokens_serve_kd_mince_and_naive_of_one_vocabulary() -> None:
    pair = {"teachers": ["base/code", "base/math"]}
    assert found(top()) == []
    assert found(top(trained("mince", **pair, fusion={"target": "mince"}))) == []
    for target in ("udf", "minilogit"):
        assert [
            key
            for key, text in found(top(trained("x", **pair, fusion={"target": target})))
            if text.startswith(f"{target} ") and "topk" in text
        ] == ["models.trained.x.fusion.target"]
    [(key, text)] = found(top(trained("x", **pair, fusion={"target": "naive", "temperature": 2.0})))
    assert (key, text.split(";")[0]) == ("models.trained.x.fusion.temperature", "got 2.0")

    def other(data: dict) -> None:  # base/math with a tokenizer of its own
        entry, pivot = data["models"]["base"]["math"], data["models"]["base"]["pivot"]
        del entry["init"]
        entry |= {key: pivot[key] for key in ("architecture", "tokenizer")}

    def projected(data: dict) -> None:
        other(data)
        trained("x", **pair, fusion={"target": "naive"})(data)

    told = [(key, text) for key, text in found(top(projected)) if key.startswith("models.trained.x")]
    assert [key for key, _ in told] == ["models.trained.x.teachers.1"]
    assert "(DSKD)" in told[0][1]
    assert [key for key, _ in found(projected) if "trained.x" in key] == []  # whole states can be projected


def test_generated_answers_and_teachers_do_not_go_together() -> None:
    change = trained("both", generated=["base/code"], teachers=["base/code"], fusion={"target": "kd"})
    assert [key for key, text in found(change) if "cannot go with teachers" in text] == [
        "models.trained.both.generated"
    ]


def test_references_are_checked_although_another_entry_is_faulty() -> None:
    def change(data: dict) -> None:
        data["models"]["trained"]["sft"]["lr"] = "fast"
        data["models"]["trained"]["kd-code"]["teachers"] = ["base/cod"]

    assert [key for key, _ in found(change)] == ["models.trained.kd-code.teachers.0"]


def test_a_reference_to_a_faulty_entry_is_no_second_mistake() -> None:
    assert found(lambda data: data["mixes"]["student"].update(max_length=-1)) == []


def test_a_parent_that_starts_elsewhere_or_nowhere_is_told_apart() -> None:
    def change(data: dict) -> None:
        trained("far", init="base/code", save_dtype="float32")(data)
        data["models"]["base"]["own"] = {"kind": "path", "path": "x", "vocabulary": "x", "license": "mit"}
        merged("m", parents=["trained/far", "base/own"])(data)

    first, second = (text for key, text in found(change))
    assert first.startswith("'trained/far' starts from 'base/code', the merge's pivot is 'base/pivot'")
    assert second.startswith("'base/own' was not trained from it")


def test_a_parents_default_dtype_is_the_papers_and_is_refused() -> None:
    def change(data: dict) -> None:
        trained("half")(data)
        merged("m", parents=["trained/half"])(data)

    ((key, text),) = found(change)
    assert key == "models.merged.m.parents.0"
    assert "saved in bfloat16" in text


def test_a_long_cycle_is_told_once_with_its_way() -> None:
    def change(data: dict) -> None:
        trained("a", init="trained/c")(data)
        trained("b", init="trained/a")(data)
        trained("c", init="trained/b")(data)

    ((key, text),) = found(change)
    assert key == "models.trained.a"
    assert text == "needs itself: trained/a <- trained/c <- trained/b <- trained/a"


def test_a_path_dataset_may_be_smaller_than_the_mix_says_until_it_is_staged() -> None:
    def change(data: dict) -> None:
        data["datasets"]["own"] = {
            "kind": "path",
            "path": "a.jsonl",
            "layout": "messages",
            "license": "mit",
            "domain": "x",
        }
        data["mixes"]["raw"]["datasets"]["own"] = 10**9

    assert found(change) == []


def test_columns_belong_to_layout_pair_alone() -> None:
    own = {
        "kind": "path",
        "path": "a.jsonl",
        "layout": "messages",
        "license": "mit",
        "domain": "x",
        "columns": {"prompt": "q", "response": "a"},
    }
    assert found(lambda data: data["datasets"].update(own=own)) == [
        ("datasets.own.columns", "has no meaning with layout 'messages'")
    ]
    assert found(lambda data: data["datasets"].update(own={**own, "layout": "pair"})) == []


def test_the_study_type_is_what_the_checks_read() -> None:
    study, mistakes = _parse(small())
    assert isinstance(study, Study)
    assert mistakes == []


@pytest.mark.parametrize("name", ["model", "average", "mmlu_stderr", "mmlu_k"])
def test_a_task_cannot_take_the_name_of_a_table_column(name: str) -> None:
    def change(data: dict) -> None:
        data["tasks"][name] = data["tasks"]["mmlu"]
        data["batches"]["more"] = [name]

    assert [key for key, text in found(change) if "name of a column" in text] == [f"tasks.{name}"]


def test_a_teacher_must_be_among_the_tokenizers_its_mix_fits() -> None:
    assert [
        key
        for key, text in found(lambda data: data["mixes"]["student"].update(tokenizers=["base/pivot", "base/math"]))
        if "under tokenizers" in text
    ] == ["models.trained.kd-code.teachers.0"]


def test_a_table_cannot_have_the_name_of_the_report_of_costs() -> None:
    def change(data: dict) -> None:
        data["tables"]["cost"] = data["tables"].pop("table2")

    assert [key for key, text in found(change) if "results/cost.csv; take another" in text] == ["tables.cost"]


def test_a_table_cannot_have_the_name_of_another_tables_costs() -> None:
    def change(data: dict) -> None:
        data["tables"]["table2.cost"] = data["tables"]["table2"]

    text = "is the name of the costs of a table 'table2', results/table2.cost.csv; take another"
    assert ("tables.table2.cost", text) in found(change)


@pytest.mark.parametrize(
    ("section", "suffix", "file"),
    [
        ("tables", "provenance", "t.provenance.json"),
        ("tasks", "provenance", "t.provenance.json"),
        ("tables", "cost", "t.cost.csv"),
    ],
)
def test_two_names_whose_files_would_be_the_same_are_refused_with_both(section: str, suffix: str, file: str) -> None:
    """``t.provenance`` has its manifest where ``t`` has the record of how it was made."""

    def change(data: dict[str, Any]) -> None:
        entry = next(iter(data[section].values()))
        data[section] = {"t": entry, f"t.{suffix}": entry, f"other.{suffix}": entry, **data[section]}

    texts = [text for key, text in found(change) if "would both write" in text]
    assert texts == [f"'t.{suffix}' and 't' would both write {file}; rename one of them"]


@pytest.mark.parametrize(("section", "what"), [("tables", "table"), ("tasks", "cell of a task")])
def test_a_table_or_a_task_cannot_be_called_manifest(section: str, what: str) -> None:
    expected = f"'manifest' cannot be the name of a {what}: its file would be a manifest.json"
    change: Change = lambda data: data[section].update(manifest=next(iter(data[section].values())))  # noqa: E731
    assert (f"{section}.manifest", expected) in found(change)
