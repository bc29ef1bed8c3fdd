import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmfusion.io.templates import TODAY, RefusedByTemplate, Template, TemplateError, UnsafeTemplate, compiled
from tests.project import ROOT
from tests.unit.data.chat_models import NAMES, source, template
from tests.unit.io.hostile_templates import ESCAPES, HOSTILE, LOOPS, SIZES

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello {{ there }}"}]
GIVEN = {"messages": MESSAGES, "tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>"}


def render(text, style="chat", **given):
    return Template(text, "models/x: the chat template", style).render(**{**GIVEN, **given})


def test_there_are_more_than_a_hundred_hostile_templates():
    assert len(HOSTILE) == len(LOOPS) + len(SIZES) + len(ESCAPES) > 100


@pytest.mark.parametrize("style", ["chat", "prompt"])
def test_every_hostile_template_is_refused_in_little_time_and_memory(style):
    """In a process of its own, with 1 GiB of address space beside what Python takes, and 60 s of processor time."""
    code = (
        "import resource\n"
        "from tests.unit.io.hostile_templates import HOSTILE\n"
        "from llmfusion.io.templates import TemplateError, Template\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "for name, text in HOSTILE.items():\n"
        "    try:\n"
        f"        out = Template(text, name, {style!r}).render(**{GIVEN!r})\n"
        "        print('RENDERED', name, out[:80])\n"
        "    except TemplateError as error:\n"
        "        assert str(error).startswith(name), error\n"
        "        assert len(str(error)) < 400, error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr[-2000:], done.returncode) == ("", "", 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime < 300


@pytest.mark.parametrize("name", ["doubling with ~", "nested loops", "lists in lists", "a format's width"])
def test_the_bounds_hold_in_a_thread_too(name):
    def verdict(_):
        with pytest.raises(UnsafeTemplate, match="line 1"):
            render(HOSTILE[name])
        return render("{{ messages[0].content }}")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(verdict, range(8))) == ["Hi"] * 8


def test_what_a_template_may_do_grows_with_its_input():
    inner = "{% for n in messages %}{% if m.content == n.content %}x{% endif %}{% endfor %}"
    assert len(render("{% for m in messages %}" + inner + "{% endfor %}", messages=MESSAGES * 150)) == 2 * 150**2
    long = [{"role": "user", "content": "word " * 400_000}]
    assert render("{{ messages[0].content | trim | upper }}", messages=long) == ("WORD " * 400_000).strip()


def test_the_same_template_is_refused_at_the_same_size_every_time():
    def largest():
        return next(n for n in range(1000, 10**6, 1000) if is_refused(f"{{% for a in range({n}) %}}x{{% endfor %}}"))

    def is_refused(text):
        try:
            render(text)
        except UnsafeTemplate:
            return True
        return False

    assert largest() == largest()


def clock(monkeypatch):
    class Clock:
        now = staticmethod(lambda: TODAY)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_true_templates_render_as_transformers_renders_them(name, add_generation_prompt, monkeypatch):
    clock(monkeypatch)
    facts = source(name)
    tokens = {"eos_token": facts["eos_token"]} | ({"bos_token": facts["bos_token"]} if facts["bos_token"] else {})
    conversations = [
        MESSAGES[:1],
        MESSAGES,
        MESSAGES * 3,
        [{"role": "system", "content": " Be brief. "}, *MESSAGES],
        [
            {"role": "user", "content": " <think>a</think> \n"},
            {"role": "assistant", "content": "<think>b</think>\n\nc "},
        ],
        MESSAGES[1:],
        MESSAGES[:1] * 2,
    ]
    for messages in conversations:
        given = {"add_generation_prompt": add_generation_prompt, **tokens}
        try:
            expected = render_jinja_template([messages], chat_template=template(name), **given)[0][0]
        except jinja2.TemplateError:
            with pytest.raises(RefusedByTemplate):
                compiled(template(name), name, "chat").render(messages=messages, tools=None, documents=None, **given)
            continue
        found = compiled(template(name), name, "chat").render(messages=messages, tools=None, documents=None, **given)
        assert found == expected


FEATURES = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'é<': none} | tojson(ensure_ascii=true) }}",
    "{{ {'a': 1, 'b': [1, 2.5, true]} | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{{ messages[::-1] | map(attribute='role') | list }}{{ messages[1:] | length }}{{ messages[-1]['content'][:3] }}",
    "{%- for m in messages -%} {{ loop.index }}/{{ loop.length }} {{ loop.previtem is defined }} {%- endfor -%}",
    "{{ strftime_now('%d %b %Y') }}|{{ tools is none }}|{{ documents is none }}|{{ pad_token is defined }}",
    "{% macro show(m, end='.') %}<{{ m.role ~ end }}>{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'abc'.replace('b', 'd') }}{{ '%s-%03d' % ('a', 7) }}",
    "{{ '{:>4} {a}'.format(1, a=2) }}{{ ','.join(['a', 'b']) }}{{ '{b}'.format_map({'b': 3}) }}",
    "{{ messages[0].items() | list }}{{ messages[0].get('role') }}{{ messages[0].keys() | sort }}{{ dict(a=1) }}",
    "{{ (1, 2) + (3,) }}{{ [1] * 3 }}{{ 2 ** 8 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1 / 4 }}{{ 'a' ~ 1 ~ none }}{{ 'a' * 3 }}",
    "{{ 'a' in 'abc' }}{{ 1 < 2 <= 2 }}{{ 'x' if messages else 'y' }}{{ missing }}{{ missing | default('d') }}",
    "{% set x %}{{ messages[0].content }}!{% endset %}{{ x }}{% filter upper %}a{{ x }}{% endfilter %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{{ 'a\nb' | indent(2) }}{{ 'a b' | title }}{{ 3.7 | round }}{{ '5' | int + 1 }}{{ [3, 1] | sort }}",
    "{{ [1, 2] | sum }}{{ [1, 2] | sum(start=3) }}{{ [3, 1] | max }}{{ 'ab' | reverse }}{{ 'ab' | replace('a', 'c') }}",
    "{{ range(3) | list }}{{ [1, 1, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 'x' | e }}{{ '<' | e }}",
    "{% macro wrap() %}<{{ caller('x') }}>{% endmacro %}{% call(m) wrap() %}{{ m }}{% endcall %}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "{% set j = joiner(', ') %}{{ j() }}{{ j() }}",
]


@pytest.mark.parametrize("text", FEATURES)
def test_what_templates_use_works_as_in_transformers(text, monkeypatch):
    clock(monkeypatch)
    expected = render_jinja_template([MESSAGES], chat_template=text, bos_token="<s>", eos_token="</s>")[0][0]
    assert render(text) == expected


def test_a_templates_own_refusal_is_told_from_its_failures():
    with pytest.raises(RefusedByTemplate, match="models/x: the chat template, line 2: Roles must alternate"):
        render("{% if true %}\n{{ raise_exception('Roles must\nalternate') }}{% endif %}")
    with pytest.raises(TemplateError, match="line 3: UndefinedError: 'dict object' has no attribute 'name'") as failed:
        render("{# one\ntwo #}\n{{ messages[0].name.upper() }}")
    assert failed.value.summary == "UndefinedError, line 3"
    with pytest.raises(TemplateError, match=r"the chat template: UnicodeEncodeError: .* surrogates not allowed"):
        render(r"{{ '\ud800' }}")
    with pytest.raises(TemplateError, match="the chat template, line 2: unexpected '}'"):
        Template("{{ 1 }}\n{{ } }}", "the chat template", "chat")


def test_prompts_are_strict_and_keep_their_line_breaks():
    assert render("{{ question }}\n", "prompt", question="Why?") == "Why?\n"
    assert render("{{ question }}\n", "prompt without trailing newline", question="Why?") == "Why?"
    with pytest.raises(TemplateError, match="'question' is undefined"):
        render("{{ question }}", "prompt")
    with pytest.raises(TemplateError, match="'raise_exception' is undefined"):
        render("{{ raise_exception('a') }}", "prompt")


def test_prompts_render_as_lm_eval_renders_them():
    from lm_eval.utils import apply_template

    item = {"question": "What?\n", "choices": ["a & b", "<c>"], "answer": 1, "n": 2.5, "none": None}
    texts = [
        "{{ question }}{% for choice in choices %}\n{{ 'ABC'[loop.index0] }}. {{ choice }}{% endfor %}\n",
        "  {%- if answer %} {{ choices[answer] | upper }}{% endif %}\n\n",
        "{{ question.rstrip() }} {{ n }} {{ none }} {{ choices | tojson }} {{ choices | join('; ') }}",
        "{% set x = choices | length %}{{ x }}{{ 'ABC'[answer] }}",
    ]
    for text in texts:
        assert Template(text, "t", "prompt").render(**item) == apply_template(text, item)
