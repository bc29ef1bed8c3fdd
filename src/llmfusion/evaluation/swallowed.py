"""Whether an exception was caught by a test's own ``try`` or ``with``, or ended one of its loops unseen.

Python ends a ``for`` at a StopIteration, the old iteration protocol at an IndexError, and ``hasattr`` takes an
AttributeError for a no. A program that raises one of these must not pass because the test then had nothing to compare.
"""

import ast
from collections.abc import Iterator, Mapping

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def is_caught(error: BaseException, sources: Mapping[str, str]) -> bool:
    """Whether the outermost frame that the exception reached was in a ``try`` or ``with`` of one of these sources.

    The exception has a traceback from the start. One that Python swallows has no other frames in it, or only some that
    catch nothing.
    """
    reached = error.__traceback__
    if reached is None:  # taken away by who caught it, as unittest does
        return True
    code = reached.tb_frame.f_code
    if code.co_filename not in sources:
        module = str(reached.tb_frame.f_globals.get("__name__"))
        return module.partition(".")[0] == "unittest"  # assertRaises(error, function)
    guarded = _guarded(ast.parse(sources[code.co_filename]), code.co_firstlineno)
    return any(reached.tb_lineno in lines for lines in guarded)


def _guarded(tree: ast.AST, first_line: int) -> Iterator[range]:
    """Lines within ``try`` and ``with`` of the function that begins at a line (1: also of the module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module):
            begins = 1
        elif isinstance(node, FUNCTIONS):
            begins = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        else:
            continue
        if begins == first_line:
            yield from (_lines(part) for part in _own_nodes(node) if isinstance(part, ast.Try | ast.With))


def _lines(node: ast.Try | ast.With) -> range:
    body = node.body
    return range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions in it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, FUNCTIONS):
            yield node
            yield from _own_nodes(node)
