"""Whether a model continues a recurrent state in a pass of several tokens; not all families do."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from headinfer.integration.calls import cache_argument, new_shape
from headinfer.integration.support import stock_cache

_PROBE_TOKENS = 8
"""Tokens of one pass of the trial: more than a convolution looks back."""

_STATES = ("conv_states", "recurrent_states")
"""What a layer of transformers keeps of the past where it keeps no keys."""


def has_state(model: Any) -> bool:
    """Whether some layers of a model keep a state in place of keys."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in stock_cache(model).layers)


@torch.no_grad()
def continues_state(model: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Try a model out: is each state of a first pass taken into account by a second?

    The states are made NaN in between, so that the answer depends on neither weights nor precision.
    The answer holds for the kernels that this machine has, and for families nobody knows yet.

    Args:
        model: the model.
        forward: its own; called with caches made here.
        arguments: of a call, whose first tokens serve.
    """
    shape = new_shape(arguments)
    assert shape is not None
    tokens = min(_PROBE_TOKENS, shape[1] // 2)
    if tokens < 2:
        return False

    def call(cache: DynamicCache, start: int, end: int) -> torch.Tensor:
        given = _tokens(forward, arguments, start, end)
        named = cache_argument(model, cache)
        logits: torch.Tensor = forward(**given, **named, use_cache=True, return_dict=True).logits
        return logits

    cache = stock_cache(model)
    call(cache, 0, tokens)
    kinds = {kind for layer in cache.layers for kind in _states(layer)}
    for kind in kinds:
        cache = stock_cache(model)
        call(cache, 0, tokens)
        if not _spoil(cache, kind) or not bool(call(cache, tokens, 2 * tokens)[:, 0].isnan().any()):
            return False
    return bool(kinds)


def _spoil(cache: DynamicCache, kind: tuple[str, int]) -> bool:
    """Make one kind of state NaN in all layers; return whether it can be."""
    states = [_states(layer)[kind] for layer in cache.layers if kind in _states(layer)]
    if not all(state.is_floating_point() for state in states):
        return False
    for state in states:
        state.fill_(torch.nan)
    return True


def _states(layer: Any) -> dict[tuple[str, int], torch.Tensor]:
    """Return the states a layer holds, by attribute and number."""
    return {
        (name, number): state
        for name in _STATES
        for number, state in (getattr(layer, name, None) or {}).items()
        if state is not None
    }


def _tokens(
    forward: Callable[..., Any], arguments: dict[str, Any], start: int, end: int
) -> dict[str, Any]:
    """Return the arguments that give the tokens from `start` to before `end` of the first row."""
    given = {
        name: arguments[name][:1, start:end]
        for name in ("input_ids", "inputs_embeds")
        if arguments.get(name) is not None
    }
    if "position_ids" in inspect.signature(forward).parameters:
        device = next(iter(given.values())).device
        given["position_ids"] = torch.arange(start, end, device=device).unsqueeze(0)
    return given
