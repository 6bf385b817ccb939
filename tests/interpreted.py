"""Triton's interpreter without most of what it does again and again."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class NoScope:
    """Takes the place of what undoes a change: another one does."""

    def restore(self) -> None:
        """Leave all as it is."""


class PatchOnce:
    """Has Triton's language changed once for a launch, not again by each function it calls.

    Looking through the language for what is to be changed took a third of a program's time.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._changed: set[frozenset[str]] = set()  # modules of the language, in this launch

    def __call__(self, function: Any) -> Any:
        seen = frozenset(
            value.__name__
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value.__name__.startswith("triton.language")
        )
        if seen in self._changed:
            return NoScope()
        outermost = not self._changed
        self._changed.add(seen)
        scope = self._patch(function)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (self._changed.clear(), restore())
        return scope


@contextmanager
def patched_once() -> Iterator[None]:
    """Have the interpreter change the language once for each launch, meanwhile."""
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patching:
        if hasattr(interpreter, "_LangPatchScope"):  # other releases may do it otherwise
            patching.setattr(interpreter, "_patch_lang", PatchOnce(interpreter._patch_lang))
        yield
