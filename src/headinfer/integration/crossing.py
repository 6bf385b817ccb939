"""What moves between devices while a prompt passes in chunks, so that none waits for a later one.

torch orders a copy between two devices behind the work of both. accelerate moves rotary tables and
positions to each layer that is elsewhere, and logits back to where the tokens came from. So the
first device would reach its next chunk only when the last one is done with this one. What layers
share therefore goes from each device to the next, as hidden states do, and nothing comes back.

Measured on four H100s: tables went from the first GPU to the fourth. The first one then began with
a chunk when the fourth was done with the last but one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headinfer.integration.accelerate_hooks import accelerate_hooks, device_of

_HIDDEN_STATES = "hidden_states"
"""What each layer is given anew, under transformers' name."""


class Crossings:
    """A knowledge of where a model's calls go from device to device, as accelerate's hooks say.

    Args:
        model: may be spread over several devices, or not.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @contextlib.contextmanager
    def once(self, *, discards: bool, leaving: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Have what layers share move once to each device, until the `with` statement ends.

        For one call of the model. What it was given must not change meanwhile.

        Args:
            discards: whether nobody uses the output. It then stays where it was computed, and the
                model's head is passed over where the first device has it.
            leaving: called when a device's work is all enqueued, before anything crosses to the
                next one: what follows on the device waits for that.
        """
        hooks = accelerate_hooks(self._model)
        places = [where for hook in hooks if (where := device_of(hook)) is not None]
        with contextlib.ExitStack() as undo:
            if places:
                self._bring_once(places[0], leaving, undo)
            if places and discards:
                for hook in hooks:
                    if getattr(hook, "io_same_device", False):
                        undo.callback(setattr, hook, "io_same_device", True)
                        hook.io_same_device = False
                self._pass_over_head(places[0], undo)
            yield

    def _bring_once(
        self, first: torch.device, leaving: Callable[[], None], undo: contextlib.ExitStack
    ) -> None:
        bringers: dict[torch.device, _Bringer] = {}
        newest: _Copies = {}
        for module, where in _entries(self._model, first):
            bringer = bringers.setdefault(where, _Bringer(where, leaving, newest))
            undo.callback(module.register_forward_pre_hook(bringer, with_kwargs=True).remove)

    def _pass_over_head(self, first: torch.device, undo: contextlib.ExitStack) -> None:
        head = self._model.get_output_embeddings()
        if head is None or {each.device for each in head.parameters()} != {first}:
            return
        attributes = head.__dict__
        if "forward" in attributes:
            undo.callback(attributes.__setitem__, "forward", attributes["forward"])
        else:
            undo.callback(attributes.pop, "forward")
        attributes["forward"] = _same


def _same(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def _entries(
    module: torch.nn.Module, first: torch.device
) -> Iterator[tuple[torch.nn.Module, torch.device]]:
    """Yield the outermost modules that compute elsewhere than on the first device, and where."""
    for child in module.children():
        places = {device_of(hook) for hook in accelerate_hooks(child)} - {None, first}
        if places:
            yield child, places.pop()  # type: ignore[misc]  # None is taken out
        else:
            yield from _entries(child, first)


_Copies = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Tensors and a copy of each, by the number (`id`) of the first, which is its own while kept."""


class _Bringer:
    """A hook in front of modules on one device that brings each of their arguments once.

    Hidden states are left to accelerate, since no other module is given the same.

    Args:
        where: the device.
        leaving: called before anything comes from the device before.
        newest: of what was brought anywhere, the copy on the device that was reached last.
    """

    def __init__(self, where: torch.device, leaving: Callable[[], None], newest: _Copies) -> None:
        self._where = where
        self._leaving: Callable[[], None] | None = leaving
        self._newest = newest
        self._brought: _Copies = {}

    def __call__(
        self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._leaving is not None:
            self._leaving()
            self._leaving = None
        own = {
            name: value if name == _HIDDEN_STATES else self._bring(value)
            for name, value in kwargs.items()
        }
        return (*args[:1], *map(self._bring, args[1:])), own

    def _bring(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self._bring, value))
        if not isinstance(value, torch.Tensor) or value.device == self._where:
            return value
        if id(value) not in self._brought:
            _, source = self._newest.get(id(value), (value, value))
            copy = value, source.to(self._where, non_blocking=True)
            self._brought[id(value)] = self._newest[id(value)] = copy
        return self._brought[id(value)][1]
