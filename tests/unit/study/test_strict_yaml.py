"""YAML 1.2 values, duplicate keys, lines: against values written down by hand."""

from pathlib import Path

import pytest

from llmfusion.study import strict_yaml
from llmfusion.study.strict_yaml import YamlError, load, load_text


def read(folder: Path, text: str | bytes) -> tuple[object, dict]:
    file = folder / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("4e-3", 0.004),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("1.5e+3", 1500.0),
        ("-.inf", float("-inf")),
        ("10", 10),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("off", "off"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-6'", "1e-6"),
        ('"10"', "10"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("-", [None]),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(tmp_path: Path, text: str, value: object) -> None:
    given, _ = read(tmp_path, f"- {text}\n" if text != "-" else "- \n- 1\n")
    expected = [value] if text != "-" else [None, 1]
    assert given == expected
    assert [type(v) for v in given] == [type(v) for v in expected]


def test_command_line_values_follow_the_same_rules() -> None:
    assert load_text("1e-6") == 1e-6
    assert load_text("no") == "no"
    assert load_text("[1, 0.5]") == [1, 0.5]


def test_nan_is_read_as_a_number(tmp_path: Path) -> None:
    (value,), _ = read(tmp_path, "[.nan]")
    assert value != value


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    _, lines = read(tmp_path, "# comment\na:\n  b: 1\n\n  c:\n    - x\n    - y: 2\n")
    assert lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 5, ("a", "c", 0): 6, ("a", "c", 1): 7, ("a", "c", 1, "y"): 7}


def test_merged_keys_have_the_line_where_they_were_written_unless_overridden(tmp_path: Path) -> None:
    data, lines = read(tmp_path, "base: &b\n  x: 1\n  y: 2\nuse:\n  <<: *b\n  y: 3\n")
    assert data["use"] == {"x": 1, "y": 3}
    assert lines["use", "x"] == 2
    assert lines["use", "y"] == 6


def test_all_duplicate_keys_are_told_at_once_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(YamlError) as caught:
        read(tmp_path, "a: 1\nb: {c: 1, c: 2}\n'a': 3\n")
    assert caught.value.problems == [
        (2, "key 'c' again (first on line 2); keep one"),
        (3, "key 'a' again (first on line 1); keep one"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (b"a: 1\nb: \xff\n", 2, "not UTF-8: byte 8 is 0xff"),
        ("a: [1\nb: 2\n", 2, "expected"),
        ("a: 1\n  b: 2\n", 2, "not allowed"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: *b\n", 1, "undefined alias"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "no values of type !!python/object/apply:os.system"),
        ("a: &x [1, *x]\n", 1, "contains itself"),
        ("a: &x\n  <<: *x\n", 1, "contains itself"),
        ("? [a, b]\n: 1\n", 1, "plain word"),
        ("a: !!bool maybe\n", 1, "maybe"),
        ("a: 1\nb: !!timestamp soon\n", 2, "no values of type !!timestamp"),
        ("a: 1\nb: !!binary eA==\n", 2, "no values of type !!binary"),
        ("a: 1\nb: !!set {x}\n", 2, "no values of type !!set"),
        ("a: 1\n2: b\n", 2, "'2' is read as int: put it in quotes"),
        ("a: 1\ntrue: b\n", 2, "'true' is read as bool: put it in quotes"),
        ("a: 1\n~: b\n", 2, "'~' is read as null: put it in quotes"),
        ("a: !!int 1.5\n", 1, "1.5"),
        ("a: 1\nb: " + "9" * 5000, 2, "(5000 digits) is too large: 2^63 or more"),
        ("a: 1\nb: 9223372036854775808", 2, "9223372036854775808 is too large"),
        ("a: 1\nb: !!float x", 2, "expected a number, got 'x'"),
        ("a: 1\nb: \x07\n", 2, "0x0007 is not allowed"),
        ("a: 1\nb:\n" + "[" * 500, 3, "nested more than 50 levels deep"),
        ("x0: &a0 []\n" + "".join(f"x{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), 1, "nested more than 50"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, told: str
) -> None:
    with pytest.raises(YamlError) as caught:
        read(tmp_path, text)
    (first, message), *_ = caught.value.problems
    assert first == line
    assert told in message


def test_an_empty_file_is_none_and_a_missing_one_an_oserror(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n") == (None, {})
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.yaml")


def test_pyyaml_itself_is_left_alone() -> None:
    import yaml

    assert yaml.safe_load("no") is False
    assert strict_yaml.load_text("no") == "no"


def test_anchors_that_multiply_are_refused_and_not_expanded(tmp_path: Path) -> None:
    lists = "".join(f"x-{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))
    merges = "x-0: &m0 {a: 1}\n" + "".join(
        f"x-{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    for text in (lists, merges):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(YamlError, match="anchors that repeat anchors make more than 40,000 entries"):
            load(tmp_path / "bomb.yaml")
