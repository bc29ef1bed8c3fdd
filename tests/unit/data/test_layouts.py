import random

import pytest

from llmfusion.data.layout import item_layouts, sample_layouts
from llmfusion.study import data_plugins, plugins
from llmfusion.study.plugins import PluginError
from tests.unit.plugin_files import write_plugins

RNG = random.Random(0)
HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "Be kind"}, *HELLO["messages"]]}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("pair", {"q": "Hi", "a": "Hello", "other": 1}, HELLO),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            HELLO,
        ),
        (
            "conversations",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            HELLO,
        ),
        ("conversations", {"conversations": [{"from": "gpt", "value": "Hello"}]}, None),
        ("chatml", {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"}, HELLO),
        ("chatml", {"text": "no turns at all"}, None),
        (
            "clusters",
            {"instruction": "Be kind", "cluster": {"samples": [{"input": "Hi", "output": "Hello"}]}},
            WITH_SYSTEM,
        ),
        ("clusters", {"instruction": "", "cluster": {"samples": [{"input": "Hi", "output": "Hello"}]}}, HELLO),
        ("clusters", {"instruction": "", "cluster": {"samples": []}}, None),
        ("text", {"text": "words"}, {"text": "words"}),
        ("text", {"text": " \n"}, None),
        ("text", {"text": None}, None),
    ],
)
def test_a_row_of_each_layout(layout, row, expected):
    assert sample_layouts()[layout](row, {"prompt": "q", "response": "a"}, RNG) == expected


def test_clusters_takes_every_sample_of_a_cluster_now_and_then():
    row = {"instruction": "", "cluster": {"samples": [{"input": "Hi", "output": str(i)} for i in range(3)]}}
    assert {sample_layouts()["clusters"](row, {}, RNG)["messages"][1]["content"] for _ in range(100)} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        (
            "mmlu",
            {"question": " Q ", "choices": ["a", "b"], "answer": 1, "subject": "s"},
            {"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "s"},
        ),
        (
            "gsm8k",
            {"question": "Q", "answer": "1,000 + 234\n#### 1,234"},
            {"question": "Q", "answer": "1234", "solution": "1,000 + 234"},
        ),
        (
            "math",
            {"problem": "P", "solution": r"so \boxed{1}, no, \boxed{\frac{1}{2}}.", "type": "Algebra"},
            {
                "question": "P",
                "answer": r"\frac{1}{2}",
                "solution": r"so \boxed{1}, no, \boxed{\frac{1}{2}}.",
                "subject": "Algebra",
            },
        ),
        ("math", {"problem": "P", "solution": "no box", "type": "Algebra"}, None),
        (
            "humaneval",
            {"task_id": "H/0", "prompt": "p", "entry_point": "f", "test": "t", "canonical_solution": "c"},
            {"task_id": "H/0", "prompt": "p", "entry_point": "f", "test": "t"},
        ),
    ],
)
def test_a_row_of_each_item_layout_has_the_fields_it_declares(layout, row, expected):
    assert item_layouts()[layout](row) == expected
    assert expected is None or tuple(expected) == item_layouts()[layout].fields


def test_what_a_layout_declares_is_what_tables_and_checks_need():
    assert set(sample_layouts()) == {"pair", "messages", "conversations", "chatml", "clusters", "text"}
    assert set(item_layouts()) == {"mmlu", "gsm8k", "math", "humaneval"}
    assert [name for name, layout in sample_layouts().items() if layout.needs_columns] == ["pair"]
    for name, layout in (sample_layouts() | item_layouts()).items():
        assert layout.reads
        assert plugins.summary_of(data_plugins.LAYOUTS, name)


BROKEN = {
    "no function": ("", "needs: convert; missing: convert"),
    "no decorator": (
        "def convert(row):\n    return row\n",
        "convert must be a function decorated with @sample_layout or",
    ),
    "no description": (
        "@sample_layout()\ndef convert(row, columns, rng): ...\n",
        "@sample_layout needs reads; .* example",
    ),
    "no fields": ("@item_layout(reads='x')\ndef convert(row): ...\n", "@item_layout needs fields"),
    "a parameter less": (
        "@sample_layout(reads='x', example='y')\ndef convert(row): ...\n",
        r"convert must take \(row, columns, rng\)",
    ),
    "a parameter more": (
        "@item_layout(reads='x', fields=('y',))\ndef convert(row, columns): ...\n",
        r"convert must take \(row\)",
    ),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_layout_is_refused_by_its_file_and_what_is_missing(tmp_path, monkeypatch, source, message):
    head = '"""A layout."""\nfrom llmfusion.data.layout import item_layout, sample_layout\n'
    monkeypatch.setattr(data_plugins, "LAYOUTS", write_plugins(tmp_path, monkeypatch, broken=head + source))
    with pytest.raises(PluginError, match=rf"broken\.py: .*{message}"):
        data_plugins.layouts.__wrapped__("sample")


def test_a_new_file_is_a_new_layout(tmp_path, monkeypatch):
    head = '"""Instruction and output."""\nfrom llmfusion.data.layout import sample_layout\n'
    source = (
        "@sample_layout(reads='`a`', example='A')\ndef convert(row, columns, rng):\n    return {'text': row['a']}\n"
    )
    monkeypatch.setattr(data_plugins, "LAYOUTS", write_plugins(tmp_path, monkeypatch, alpaca=head + source))
    assert data_plugins.layouts.__wrapped__("sample")["alpaca"]({"a": "hello"}, {}, RNG) == {"text": "hello"}
    assert data_plugins.layouts.__wrapped__("item") == {}
