import pytest

from llmfusion.data.latex import last_boxed


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{3}", "3"),
        ("a \\boxed{1} b \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{7}", "7"),
        ("\\boxed 5$", "5"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\boxed{}", ""),
        ("\\boxed{3", None),
        ("boxed{3}", None),
        ("", None),
        ("\\boxed", None),
        ("\\boxed ", None),
        ("\\boxed $", None),
        ("\\boxed $5$", None),
        ("\\boxed\n5", None),
        ("\\boxed{1}\\boxed{", None),
    ],
)
def test_the_content_of_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside
