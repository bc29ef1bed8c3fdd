"""What rows of a table say of themselves."""

from llmfusion.study.kinds.table import describe
from tests.unit.mini_study import small_study


def test_rows_describe_themselves() -> None:
    def uni(data: dict) -> None:
        run = data["models"]["trained"]["kd-code"]
        data["models"]["trained"]["uni"] = {**run, "teachers": ["base/code", "base/math"], "fusion": {"target": "udf"}}

    study = small_study(uni)
    rows = (
        "base/pivot",
        "trained/sft",
        "trained/seqkd-code",
        "trained/kd-code",
        "trained/uni",
        "merged/ta-homogeneous",
    )
    assert [describe(study, m) for m in rows] == [
        ("none", "pivot"),
        ("sft", "pivot"),
        ("seqkd", "code"),
        ("kd", "code"),
        ("unified-udf", "code+math"),
        ("pairwise-ta", "code+math"),
    ]
