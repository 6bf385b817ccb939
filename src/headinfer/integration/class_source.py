"""The source of classes, which tells what a model does before it runs.

`inspect` parses a whole file for each class in it, before Python 3.13: half a second for a model.
Here a file is parsed once, and only if it has the words that are looked for.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def class_source(module_class: Any, words: Sequence[str]) -> str:
    """Return the source of a class.

    Args:
        module_class: of any kind.
        words: that are looked for.

    Returns:
        Empty where the source cannot be had, or where its file has none of the words.
    """
    module = str(module_class.__module__)
    if not any(word in _text(module) for word in words):
        return ""
    return _classes(module).get(module_class.__qualname__, "")


@functools.cache
def _text(module: str) -> str:
    """Return the text of a module; empty where it cannot be had."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@functools.cache
def _classes(module: str) -> dict[str, str]:
    """Return the sources of a module's classes, by their qualified names."""
    text = _text(module)
    lines = text.splitlines(keepends=True)
    found: dict[str, str] = {}
    for name, node in _named(ast.parse(text), ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        found.setdefault(name, "".join(lines[first - 1 : node.end_lineno]))
    return found


def _named(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the classes within a node, each with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.ClassDef):
            yield f"{prefix}{node.name}", node
            inner = f"{prefix}{node.name}."
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = f"{prefix}{node.name}.<locals>."
        if not isinstance(node, ast.expr):
            yield from _named(node, inner)
