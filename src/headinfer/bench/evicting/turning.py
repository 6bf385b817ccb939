"""Turning queries back to an earlier position, by a model's own rotary modules.

Models turn queries and keys by their position. StreamingLLM counts positions within its cache.
There a query keeps its distance to recent tokens, and its distance to the first ones stops growing.
So recent keys meet the query as it is, and the first keys meet it turned back.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from headinfer.bench.evicting.attention import InConfig
from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import takes_argument
from headinfer.integration.support import attention_modules, layer_index

_POSITION, _STEPS = 37, 23
"""Where a token is tried, and how far it is turned back."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE = 3e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rotary:
    """A call of a rotary module that can be repeated at other positions.

    Attributes:
        module: the rotary module.
        arguments: what follows the positions.
        keywords: without the positions.
        apply: what turns queries and keys by the cosines and sines that come out.
    """

    module: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines in float32, without the scale that some models give them."""
        exact = torch.empty(0, device=positions.device)  # its dtype is that of the result
        steps = torch.cat((positions.new_zeros(1), positions))[None]
        cos, sin = self.module(exact, steps, *self.arguments, **self.keywords)
        scale = cos[:, :1]  # the cosine of nothing
        return cos[:, 1:] / scale, sin[:, 1:] / scale

    def back(self, query: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return queries `[heads, q_len, dim]` turned back by as many positions as `steps` has."""
        cos, sin = self.angles(steps)
        turned, _ = self.apply(query.float()[None], query.float()[None], cos, -sin)
        return turned[0]


class Turning:
    """A way to turn back the queries of each layer of a model.

    Args:
        model: stock. Two short calls tell whether turning does what an earlier position would.

    Raises:
        UnsupportedModelError: it does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if not takes_argument(model, "position_ids"):
            raise UnsupportedModelError(f"{name} takes no positions, which cannot be moved then")
        rotary = _rotary_calls(model)
        here, there = (_queries(model, place) for place in (_POSITION, _POSITION - _STEPS))
        self._rotary: dict[int, _Rotary] = {}
        for layer, query in here.items():
            if _close(query, there[layer]):
                continue  # no position enters this layer
            if layer not in rotary:
                raise UnsupportedModelError(
                    f"{name} does not turn queries by a rotary module: positions within a cache "
                    "cannot be had"
                )
            self._rotary[layer] = rotary[layer]
            if not _close(self.back(layer, query, torch.tensor([_STEPS])), there[layer]):
                raise UnsupportedModelError(
                    f"turning back the queries of {name} does not give those of an earlier "
                    "position: positions within a cache cannot be had"
                )

    def back(self, layer: int, query: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return queries `[heads, q_len, dim]` turned back by as many positions as `steps` has.

        Args:
            layer: which they are of.
            query: as the model turned them.
            steps: how far, for each; of the same device.
        """
        if layer not in self._rotary:
            return query
        return self._rotary[layer].back(query, steps.to(query.device))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    most = _TOLERANCE.get(other.dtype, _COARSE)
    difference = (one.float() - other.float()).norm()
    return bool(difference <= most * other.float().norm())


@torch.no_grad()
def _queries(model: PreTrainedModel, position: int) -> dict[int, torch.Tensor]:
    """Return the queries `[heads, 1, dim]` of one token in each layer.

    A token alone is given its own values, wherever it stands. So all layers get the same input at
    every position.
    """
    found: dict[int, torch.Tensor] = {}

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        found[layer_index(module)] = query[0]
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None

    installed = InConfig(model, attend)
    try:
        _call(model, position)
    finally:
        installed.remove()
    return found


def _call(model: PreTrainedModel, position: int) -> None:
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, position_ids=token * position, use_cache=False)


@torch.no_grad()
def _rotary_calls(model: PreTrainedModel) -> dict[int, _Rotary]:
    """Return the rotary call of each layer that is given what such a call returned."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
    given: dict[int, Any] = {}
    modules = {layer_index(module): module for module in attention_modules(model)}

    def note_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, args, kwargs, output))

    def note_given(module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[layer_index(module)] = kwargs.get("position_embeddings")

    handles = [
        module.register_forward_hook(note_call, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]
    handles += [
        module.register_forward_pre_hook(note_given, with_kwargs=True)
        for module in modules.values()
    ]
    try:
        _call(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer, module in modules.items():
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        for rotary, args, kwargs, output in calls:
            if output is given.get(layer) and isinstance(output, tuple) and apply is not None:
                rest = {key: value for key, value in kwargs.items() if key != "position_ids"}
                after = args[1:] if "position_ids" in kwargs else args[2:]
                found[layer] = _Rotary(module=rotary, arguments=after, keywords=rest, apply=apply)
    return found
