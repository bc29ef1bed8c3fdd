"""Render Jinja templates that others wrote: the chat templates of models, the prompts of a study's tasks.

Such a template is untrusted code. It reads what it is given and writes text, nothing else: Jinja's immutable sandbox,
an allowlist of attributes, methods and filters, and no tag that reads another template. And it does a bounded amount
of work: everything it can do repeatedly or with large values is charged to a budget that grows with the input. What
exceeds the budget is refused *before* it is done. The budget counts operations and characters, not seconds, so that a
template is refused everywhere or nowhere; it holds in every thread, and a single operation is never longer than it.

A chat template renders as ``apply_chat_template`` of transformers does, with one exception: the date is always
:data:`TODAY`, as a training must not change with the day on which it is resumed.
"""

import functools
import json
import re
import string
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, Literal

import jinja2
from jinja2 import filters, meta, nodes, runtime, utils
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llmfusion.errors import UserError

Style = Literal["chat", "prompt", "prompt without trailing newline"]
TODAY = datetime(2024, 7, 26)  # the date that Llama 3's templates print where they have no clock
LONGEST_TEMPLATE = 50_000  # characters; the longest in use have 20,000
WORK = 2_000_000  # units of a rendering; one is a character that is made, or a tenth of a small operation
WORK_PER_CHARACTER = 200  # of the input
OPERATION = 10
LARGEST_INTEGER = 4096  # bits
WIDTHS = re.compile(r"\d{4,}|\*")  # in a format: makes strings of any length


class TemplateError(UserError):
    """A template that cannot be compiled, or fails for its input. Names the template and the line.

    ``summary`` says so in a few words that are the same for every input that fails alike.
    """

    def __init__(self, message: str, summary: str = ""):
        super().__init__(message)
        self.summary = summary


class RefusedByTemplate(TemplateError):
    """The template itself refused its input with ``raise_exception``, such as roles that do not alternate."""


class UnsafeTemplate(TemplateError):
    """The template does what templates must not do, or more work than its input can need."""


class _Refusal(jinja2.TemplateError):
    pass


class _Budget:
    __slots__ = ("left",)

    def __init__(self, size: int):
        self.left = WORK + WORK_PER_CHARACTER * size

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise SecurityError("it does more work, or makes more text, than its input can need")

    def weigh(self, value: Any) -> int:
        """Characters and elements that ``value`` has when it is written out: a list in a list counts each time.

        Spends one unit an element that is visited. Raises SecurityError where all of it exceeds what is left.
        """
        total = 0
        stack = [value]
        while stack:
            value = stack.pop()
            self.left -= 1
            if isinstance(value, str | bytes):
                total += len(value) + 4
            elif isinstance(value, Mapping):
                total += 4 + len(value)
                stack += value.keys()
                stack += value.values()
            elif isinstance(value, list | tuple | set | frozenset):
                total += 4 + len(value)
                stack += value
            elif isinstance(value, _VIEWS):
                total += 4
                stack += value
            else:
                total += len(value) if isinstance(value, range) else 4
            if total > self.left:
                self.spend(total)
        return total


_VIEWS = (KeysView, ValuesView, ItemsView)
_budget: ContextVar[_Budget] = ContextVar("budget")
STRING_METHODS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower "
    "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
ATTRIBUTES: dict[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    runtime.Macro: frozenset({"arguments", "caller", "name"}),
    utils.Cycler: frozenset({"current", "next", "reset"}),
}
OPEN_TYPES = (runtime.LoopContext, utils.Namespace)  # of which all attributes without an underscore may be read
FORBIDDEN_TAGS = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Block: "block",
    nodes.EvalContextModifier: "autoescape",
}
Guard = Literal["tick", "value", "cost", "concat", "slice"]


# ------------------------------------------------------------------------------------------------- compiled templates


class _Guards(NodeTransformer):
    """Adds to a parsed template the calls that charge what Jinja's environment does not see."""

    def _call(self, name: Guard, *arguments: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(f"guard_{name}"), list(arguments), [], None, None)

    def _tick(self, units: int, line: int) -> nodes.ExprStmt:
        return nodes.ExprStmt(self._call("tick", nodes.Const(units)), lineno=line)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:  # counts the elements that do not pass, too
            node.test = nodes.And(self._call("tick", nodes.Const(OPERATION)), node.test)
        node.body.insert(0, self._tick(OPERATION, node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [self._tick(size, node.lineno), node] if size else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        parts: list[Any] = [node, *node.ops]
        for part in parts:
            if not isinstance(part.expr, nodes.Const):
                part.expr = self._call("cost", part.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return self._call("slice", node.node, *(bound or nodes.Const(None) for bound in bounds))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else self._call("value", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return node if node.ctx == "store" else self.visit_List(node)  # type: ignore[arg-type]  # has items, too

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._call("value", node)


class _CodeGenerator(CodeGenerator):
    def visit_Call(self, node: nodes.Call, frame: Frame, **options: Any) -> None:  # type: ignore[override]
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, **options)
            return
        self.write(f"environment.{node.node.name}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class _Generation(Extension):
    """The tag ``generation`` of transformers, around what an assistant wrote: prints its body."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **settings: Any):
        # nothing is computed when the template is compiled, where there is no budget
        super().__init__(optimized=False, finalize=_finalize, **settings)
        self.filters = {name: _guarded_filter(name, function) for name, function in FILTERS.items()}
        tests: Any = self.tests
        self.tests = {name: _guarded(function) for name, function in tests.items()}
        self.globals = {
            "range": _range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": utils.Cycler,
            "joiner": utils.Joiner,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for tag in tree.find_all(tuple(FORBIDDEN_TAGS)):
            word = next(word for kind, word in FORBIDDEN_TAGS.items() if isinstance(tag, kind))
            raise jinja2.TemplateSyntaxError(f"the tag {word!r} is not allowed", tag.lineno)
        return _Guards().visit(tree)  # type: ignore[no-any-return]

    # ---- what the generated code calls

    def guard_tick(self, units: int) -> bool:
        _budget.get().spend(units)
        return True

    def guard_value(self, value: Any) -> Any:
        budget = _budget.get()
        budget.spend(budget.weigh(value))
        return value

    def guard_cost(self, value: Any) -> Any:
        budget = _budget.get()
        budget.spend(OPERATION + budget.weigh(value) // 16)
        return value

    def guard_concat(self, *values: Any) -> str:
        return "".join([_text(value) for value in values])

    def guard_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        part = value[slice(start, stop, step)]
        _budget.get().spend(OPERATION + len(part))
        return part

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.spend(OPERATION)
        if operator == "*" and not isinstance(left, int | float):
            left, right = right, left
        if operator == "%" and isinstance(left, str):
            _require_narrow(left)
            budget.spend((1 + left.count("%")) * budget.weigh(right))
        elif operator in ("*", "**"):
            _charge_product(budget, operator, left, right)
        result = self.binop_table[operator](left, right)
        if not isinstance(result, int | float):
            budget.spend(budget.weigh(result))
        return result

    def call(__self, __context: runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        given = [value for name, value in kwargs.items() if not name.startswith("_")]
        budget.spend(OPERATION + budget.weigh([*args, *given]))
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = _charge_string_method(budget, __obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple | dict):
            budget.spend(budget.weigh(result))
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, OPEN_TYPES):
            return True
        return any(attr in names for kind, names in ATTRIBUTES.items() if isinstance(obj, kind))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reads {attribute!r:.60} of a value of type {type(obj).__name__}, which is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            budget = _budget.get()
            fields = [(field, spec) for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
            for _, spec in fields:
                _require_narrow(spec or "")
                if "{" in (spec or ""):
                    raise SecurityError("a format has a width that is computed")
            budget.spend((1 + len(fields)) * budget.weigh([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return formatted


def _require_narrow(text: str) -> None:
    if WIDTHS.search(text):
        raise SecurityError("a format has a width of more than 999")


def _charge_product(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    """Refuse products and powers whose size explodes; ``left`` is the number where one side is a sequence."""
    if isinstance(left, float) or isinstance(right, float):
        return
    if not isinstance(right, int):
        budget.spend(max(0, int(left)) * budget.weigh(right))
    elif isinstance(left, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
        if bits > LARGEST_INTEGER:
            raise SecurityError(f"a number has more than {LARGEST_INTEGER} bits")


def _charge_string_method(budget: _Budget, method: BuiltinMethodType, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge a string's method for what it reads and, where the result can be larger, for what it will make."""
    text: str = method.__self__  # type: ignore[assignment]
    budget.spend(len(text) // 16)
    if method.__name__ == "replace" and len(args) >= 2:
        _charge_replace(budget, text, *args[:2])
    elif method.__name__ == "join" and args:
        return ([_charged_item(item, len(text)) for item in args[0]], *args[1:])
    return args


def _charge_replace(budget: _Budget, text: str, old: str, new: str) -> None:
    budget.spend(len(text) + len(new) * (text.count(old) if old else len(text) + 1))


def _charged_item(item: Any, separator: int) -> Any:
    budget = _budget.get()
    budget.spend(separator + budget.weigh(item))
    return item


def _text(value: Any) -> str:
    """``str(value)``, charged before it is made."""
    budget = _budget.get()
    budget.spend(budget.weigh(value))
    return str(value)


@jinja2.pass_context
def _finalize(_context: runtime.Context, value: Any) -> Any:
    """Charges what a template prints."""
    return value if isinstance(value, jinja2.Undefined) else _text(value)


# ------------------------------------------------------------------------------------------------ globals and filters


def _range(*bounds: int) -> range:
    out = range(*bounds)
    _budget.get().spend(len(out) // 8)
    return out


class _Dict:
    """``dict`` without the class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(utils.Namespace):
    """Jinja's, without names that begin with an underscore, and printed without what it holds (it may hold itself)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that a key may be called self
        values = dict(*args[1:], **kwargs)
        for name in values:
            _Namespace._check(name)
        utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no name that begins with an underscore: {name!r:.60}")


def _raise_exception(message: Any = "") -> None:
    raise _Refusal(_text(message)[:400])


def _strftime_now(text: str) -> str:
    if len(text) > 100 or re.search(r"\d", text):
        raise SecurityError("a date's format is longer than 100 characters, or has a width")
    return TODAY.strftime(text)


def _dumps(value: Any, **options: Any) -> str:
    """``json.dumps``, charged as the text grows."""
    indent = options.get("indent")
    separators = options.get("separators") or ()
    if indent is not None and not 0 <= len(indent if isinstance(indent, str) else range(indent)) <= 16:
        raise SecurityError("tojson indents by more than 16")
    if sum(map(len, separators)) > 16:
        raise SecurityError("tojson has separators of more than 16 characters")
    budget = _budget.get()
    budget.spend(budget.weigh(value) * (6 + sum(map(len, separators))))
    parts = []
    for part in json.JSONEncoder(**{**options, "separators": separators or None}).iterencode(value):
        budget.spend(len(part))
        parts.append(part)
    return "".join(parts)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return _dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tojson_for_html(value: Any, indent: int | None = None) -> str:
    return utils.htmlsafe_json_dumps(value, dumps=_dumps, sort_keys=True, indent=indent)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = _text(value)
    old = _text(old)
    new = _text(new)
    _charge_replace(_budget.get(), text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    return filters.sync_do_join(context, [_charged_item(item, len(d)) for item in value], d)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _text(value)
    _budget.get().spend((2 + text.count("\n")) * (len(width) if isinstance(width, str) else abs(width)))
    return filters.do_indent(text, width, first, blank)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 20:
        raise SecurityError("round has a precision of more than 20 digits")
    return filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, value: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("sum adds numbers only")
    return filters.sync_do_sum(environment, value, attribute, start)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    text = _text(value)
    _require_narrow(text)
    budget = _budget.get()
    budget.spend((1 + text.count("%")) * budget.weigh([*args, *kwargs.values()]))
    return filters.do_format(text, *args, **kwargs)


def _list(value: Any) -> list[Any]:
    return [_charged_item(item, 0) for item in value]


def _charged_items(iterator: Iterator[Any]) -> Iterator[Any]:
    for item in iterator:
        _budget.get().spend(OPERATION)
        yield item


LIGHT_FILTERS = {"count", "d", "default", "first", "last", "length"}  # do not read what they are given
OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "string": _text,
    "sum": _sum,
    "tojson": _tojson,
}
UNCHANGED_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby int items last length lower map max min "
    "reject rejectattr reverse safe select selectattr sort title trim unique upper"
)
FILTERS = {name: filters.FILTERS[name] for name in UNCHANGED_FILTERS.split()} | OWN_FILTERS


def _guarded(function: Callable[..., Any], divisor: int = 16) -> Callable[..., Any]:
    """A filter or test that is charged for what it reads and for what it makes."""

    @functools.wraps(function)  # with the mark that says which argument Jinja adds
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        given = [value for value in args if not isinstance(value, runtime.Context | jinja2.Environment)]
        budget.spend(OPERATION + (budget.weigh([given, list(kwargs.values())]) // divisor if divisor else 0))
        result = function(*args, **kwargs)
        if isinstance(result, str | list | tuple | dict) and divisor:
            budget.spend(budget.weigh(result))
        elif isinstance(result, Iterator):
            return _charged_items(result)
        return result

    return guarded


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return _guarded(function, 0 if name in LIGHT_FILTERS else 8)


# ------------------------------------------------------------------------------------------------------ for the users


def _environment(style: Style) -> _Environment:
    if style == "chat":
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        return environment
    environment = _Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=style == "prompt")
    environment.filters["tojson"] = _guarded(_tojson_for_html, 8)
    return environment


class Template:
    """A compiled template. ``name`` says in errors which one it is; ``fields`` are the variables that it reads."""

    def __init__(self, text: str, name: str, style: Style):
        self.name = name
        environment = _environment(style)
        if len(text) > LONGEST_TEMPLATE:
            raise UnsafeTemplate(f"{name}: has {len(text):,} characters; a template has at most {LONGEST_TEMPLATE:,}")
        try:
            self.fields = frozenset(meta.find_undeclared_variables(environment.parse(text)))
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{name}, line {error.lineno}: {error.message}") from None
        except (RecursionError, MemoryError):
            raise UnsafeTemplate(f"{name}: is nested too deeply to be compiled") from None
        except Exception as error:  # Python's compiler and Jinja's parser: many types
            raise TemplateError(f"{name}: cannot be compiled: {_short(error)}") from None

    def render(self, **variables: Any) -> str:
        """The text for these variables: plain data, as JSON has.

        Raises :class:`RefusedByTemplate`, :class:`UnsafeTemplate`, or :class:`TemplateError` where it fails otherwise.
        """
        budget = _Budget(0)
        budget.left = _MANY  # while the input is measured
        token = _budget.set(_Budget(budget.weigh(variables)))
        try:
            text = "".join(self._template.root_render_func(self._template.new_context(variables)))
            text.encode()  # half a character, as "\\ud800" is, is no text to a tokenizer
            return text
        except _Refusal as error:
            raise RefusedByTemplate(f"{self._place(error)}: {_short(error)}", "refused") from None
        except (SecurityError, RecursionError, MemoryError) as error:
            reason = _short(error) if isinstance(error, SecurityError) else "it is nested too deeply"
            raise UnsafeTemplate(f"{self._place(error)}: {reason}") from None
        except Exception as error:  # whatever the template's expressions raise
            kind = type(error).__name__
            place = self._place(error)
            raise TemplateError(f"{place}: {kind}: {_short(error)}", f"{kind}{place[len(self.name) :]}") from None
        finally:
            _budget.reset(token)

    def _place(self, error: BaseException) -> str:
        """The template's name and the line that raised ``error``."""
        line = None
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_globals.get("__jinja_template__") is self._template:
                line = self._template.get_corresponding_lineno(traceback.tb_lineno)
            traceback = traceback.tb_next
        return self.name if line is None else f"{self.name}, line {line}"


_MANY = 10**12


def _short(error: BaseException) -> str:
    """The message in one line of at most 200 characters."""
    return " ".join(str(error)[:400].split())[:200]


@functools.lru_cache(maxsize=64)
def compiled(text: str, name: str, style: Style) -> Template:
    """The template ``text``, compiled once.

    ``style`` ``chat`` is a model's chat template; ``prompt`` a task's prompt, in which an unknown variable is an error.
    Raises :class:`TemplateError` naming the line that is no Jinja, :class:`UnsafeTemplate` for one too large.
    """
    return Template(text, name, style)
