"""Right programs with one small mistake each: what a model that is nearly right writes."""

import ast
import random
from collections.abc import Callable, Iterator
from functools import partial

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.FloorDiv,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitXor: ast.BitOr,
}


def mutated(source: str, entry_point: str, seed: str) -> str:
    """The program with one change in its entry point, always the same one for a seed."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point)
    random.Random(seed).choice(list(_changes(function)))()
    return ast.unparse(ast.fix_missing_locations(tree))


def _changes(function: ast.FunctionDef) -> Iterator[Callable[[], object]]:
    """All small changes; calling one makes it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Compare):
            for number, operator in enumerate(node.ops):
                yield partial(node.ops.__setitem__, number, SWAPPED[type(operator)]())
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
            yield partial(setattr, node, "op", SWAPPED[type(node.op)]())
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield partial(setattr, node, "value", node.value + 1)
            yield partial(setattr, node, "value", node.value - 1)
        elif isinstance(node, ast.If | ast.IfExp):
            yield partial(setattr, node, "test", ast.UnaryOp(ast.Not(), node.test))
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(block, list):
                for number, statement in enumerate(block):
                    if not (
                        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                    ):  # a docstring
                        yield partial(block.__setitem__, number, ast.Pass())
