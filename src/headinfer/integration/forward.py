"""Standing in front of one module instance's `forward`, and going away again."""

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from headinfer.engine.ending import uninterrupted

Serve = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Serves a call: given the forward behind us, and the call's arguments by position and by name."""


class InstanceForward:
    """A `forward` in an instance's own attributes, in front of the one it had.

    Others may do the same before or after us, as accelerate does, and may stop in any order. A
    forward that is covered by another when it is removed passes calls on. It goes as soon as it
    can. Copies and pickles of the instance are without it.

    Args:
        model: the instance.
        serve: serves its calls; kept from torch.compile, which breaks its graph here.
        mark: an attribute of the instance that its copies are without, too.
    """

    # Not in `__dict__`, which whoever wraps this copies.
    __slots__ = ("__dict__", "_had_own", "_mark", "_model", "_serve", "inner")

    def __init__(self, model: torch.nn.Module, serve: Serve, mark: str) -> None:
        self._model = model
        self._mark = mark
        self._had_own = "forward" in model.__dict__
        self._serve: Serve | None = torch.compiler.disable(serve)
        self.inner: Callable[..., Any] = model.forward
        # For whoever reads the signature, as `generate` does. Its `__dict__` is not ours: what
        # torch.compile notes there would have our code skipped.
        functools.update_wrapper(self, self.inner, updated=())

    def install(self) -> None:
        """Take the place of the instance's `forward`."""
        self._model.forward = self
        self._model.__dict__["__reduce_ex__"] = self._reduce_model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the call served, or pass it on once removed."""
        serve = self._serve
        if serve is not None:
            return serve(self.inner, args, kwargs)
        self._uncover()
        return self.inner(*args, **kwargs)

    def remove(self) -> None:
        """Serve no more calls, and leave the instance as it was if nobody stands in front."""
        self._serve = None
        self._model.__dict__.pop("__reduce_ex__", None)
        self._uncover()

    def _uncover(self) -> None:
        attributes = self._model.__dict__
        if attributes.get("forward") is self:
            if self._had_own:
                attributes["forward"] = self.inner
            else:
                del attributes["forward"]

    def _reduce_model(self, protocol: Any) -> tuple[Any, ...]:
        """Return what `copy` and `pickle` make the instance anew from: all but us."""
        reduced: Any = type(self._model).__reduce_ex__(self._model, protocol)
        make, arguments, state, *rest = reduced
        ours = ("__reduce_ex__", self._mark)
        state = {name: value for name, value in state.items() if name not in ours}
        if state.get("forward") is self:
            state["forward"] = self.inner
            if not self._had_own:
                del state["forward"]
        return (make, arguments, state, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy of what is behind: whoever stands in front may be copied with us."""
        return copy.deepcopy(self.inner, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what is behind, to be pickled in our place."""
        return self.inner.__reduce_ex__(protocol)


class OwnForwards:
    """A set of forwards that stand in modules' own attributes, only during some calls.

    A module that has one already is left alone, so that nobody stands in front of another. But one
    that is needless goes away meanwhile.

    Args:
        methods: each bound to its module.
        needless: forwards of others' in modules' attributes, without which they compute the same.
    """

    def __init__(
        self,
        methods: Sequence[types.MethodType],
        needless: Mapping[torch.nn.Module, Callable[..., Any]] = types.MappingProxyType({}),
    ) -> None:
        self._methods = [(method.__self__.__dict__, method) for method in methods]
        self._needless = [(module.__dict__, forward) for module, forward in needless.items()]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Have the modules compute by them until the `with` statement ends."""
        away = [each for each in self._needless if each[0].get("forward") is each[1]]
        try:
            for attributes, _ in away:
                del attributes["forward"]
            for attributes, method in self._methods:
                if "forward" not in attributes:
                    attributes["forward"] = method
            yield
        finally:
            uninterrupted(functools.partial(self._take_away, away))

    def _take_away(self, away: list[tuple[dict[str, Any], Callable[..., Any]]]) -> None:
        for attributes, method in self._methods:
            if attributes.get("forward") is method:
                del attributes["forward"]
        for attributes, forward in away:
            attributes.setdefault("forward", forward)
