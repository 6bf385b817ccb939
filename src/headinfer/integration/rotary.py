"""Rotary tables that follow the length of a pass, for prompts that go through in chunks.

Some rotary embeddings choose their frequencies by the last position they are given (transformers'
`dynamic` and `longrope`). A chunk would choose by its own last position, and the whole prompt by
the prompt's. So each chunk's call of such a module is given one position more, the whole call's
last. What comes out for that position is cut off. The module then chooses, and remembers, what it
would in one pass, whatever its own code does with the length.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from headinfer.errors import UnsupportedModelError


def rotary_modules_by_length(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a model's rotary embeddings whose frequencies follow the length of a pass."""
    return [module for module in model.modules() if _follows_length(module)]


def _follows_length(module: torch.nn.Module) -> bool:
    kind = getattr(module, "rope_type", None)  # one for all layers, or one for each type of layer
    if kind is None:
        return False
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    # Phi-3.5-MoE scales what any frequencies give by one of two factors.
    return "long_mscale" in parameters or any(
        "dynamic" in str(kind) or kind == "longrope" for kind in kinds
    )


_MROPE_AXES = 4
"""Axes of `position_ids` where a first one, for the mask alone, stands before time and place."""


def last_position(arguments: dict[str, Any], past_tokens: int, new_tokens: int) -> int:
    """Return the last position that a forward call's rotary modules are expected to see.

    Args:
        arguments: of the call, by name.
        past_tokens: tokens in the cache before it.
        new_tokens: tokens of each row.
    """
    positions = arguments.get("position_ids")
    if positions is None:
        return past_tokens + new_tokens - 1
    if positions.ndim > 2 and positions.shape[0] == _MROPE_AXES:
        positions = positions[1:]
    return int(positions.max())


class WholeCallPositions:
    """A call's last position, seen by rotary modules in each of its chunks.

    From `install` until `remove`, but while it is `suspended`.

    Args:
        last: what `last_position` returned.
    """

    def __init__(self, last: int) -> None:
        self._last = last
        self._suspended = False
        self._ends: list[torch.Tensor] = []  # read at the end alone: reading waits for the device
        self._remove: list[Callable[[], None]] = []

    def install(self, modules: list[torch.nn.Module]) -> None:
        """Let some modules, those of `rotary_modules_by_length`, see the position."""
        for module in modules:
            for handle in (
                module.register_forward_pre_hook(self._extend, with_kwargs=True),
                module.register_forward_hook(self._cut),
            ):
                self._remove.append(handle.remove)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the modules see what they are given, inside the `with` statement."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    def _extend(
        self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._suspended:
            return None
        in_args = "position_ids" not in kwargs
        positions = args[1] if in_args else kwargs["position_ids"]
        self._ends.append(positions.max())
        last = positions.new_full((*positions.shape[:-1], 1), self._last)
        positions = torch.cat((positions, last), dim=-1)
        if in_args:
            return (args[0], positions, *args[2:]), kwargs
        return args, kwargs | {"position_ids": positions}

    def _cut(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if self._suspended:
            return None
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)

    def check(self) -> None:
        """Refuse a call that is done and whose positions ended elsewhere than was foreseen.

        Raises:
            UnsupportedModelError: the chunks chose their frequencies by a wrong length.
        """
        reached = max(map(int, self._ends), default=-1)
        if reached != self._last:
            raise UnsupportedModelError(
                "this model's rotary frequencies follow the prompt's length, and it counts the "
                f"prompt's positions up to {reached} where {self._last} was expected; set "
                "chunk_tokens to at least the prompt's length"
            )

    def remove(self) -> None:
        """Leave the modules as they were; may be called again."""
        while self._remove:
            self._remove[-1]()  # each may be called again, if this is interrupted
            self._remove.pop()
